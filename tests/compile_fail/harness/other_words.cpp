// expect: some other words
static_assert(sizeof(char) == 2, "these words");
