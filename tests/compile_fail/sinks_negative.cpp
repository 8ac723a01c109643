// expect: ratplus: the number of sinks must not be negative
#include "ratplus/pattern/names.hpp"

constexpr ratplus::streaming<16, -4> pattern{};
int main() {}
