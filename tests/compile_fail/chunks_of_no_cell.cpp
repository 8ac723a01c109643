// expect: ratplus: this type is not a recurrence Cell
#include "ratplus/recurrence/chunked.hpp"

struct nothing {};

int main() { ratplus::chunked<nothing> cell(4); }
