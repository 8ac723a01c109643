// expect: ratplus: by_layer needs at least one pattern
#include "ratplus/pattern/schedule.hpp"

int main() { [[maybe_unused]] ratplus::by_layer<> layers; }
