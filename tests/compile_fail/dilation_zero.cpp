// expect: ratplus: a dilation must be at least 1
#include "ratplus/pattern/names.hpp"

constexpr ratplus::dilated<0> none{};
