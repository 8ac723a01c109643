// expect: ratplus: a pattern's numbers must not exceed ratplus::max_position
#include "ratplus/pattern/names.hpp"

constexpr ratplus::local<(1ll << 40)> pattern{};
int main() {}
