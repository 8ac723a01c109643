// expect: it lacks `bool sees(index_t query, index_t key) const`
#include "ratplus/pattern/names.hpp"
#include "ratplus/pattern/schedule.hpp"

struct nothing {};

int main() { [[maybe_unused]] ratplus::by_head<ratplus::dense, nothing> heads; }
