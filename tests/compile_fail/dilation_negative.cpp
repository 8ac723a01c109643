// expect: ratplus: a dilation must be at least 1
#include "ratplus/pattern/sparse.hpp"

constexpr ratplus::sparse<-2, 8> pattern{};
int main() {}
