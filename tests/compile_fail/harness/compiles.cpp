int main() {}
// expect: nothing at all
