// expect: ratplus: a window must not be negative
#include "ratplus/pattern/names.hpp"

constexpr ratplus::dilated_local<4, -1> pattern{};
int main() {}
