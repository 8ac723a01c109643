// expect: ratplus: by_head needs at least one pattern
#include "ratplus/pattern/schedule.hpp"

int main() { [[maybe_unused]] ratplus::by_head<> heads; }
