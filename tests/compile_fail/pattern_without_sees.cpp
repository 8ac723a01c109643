// expect: it lacks `bool sees(index_t query, index_t key) const`
// expect: Read ratplus/pattern/concept.hpp
#include "ratplus/backend/reference/attend.hpp"

struct itself_alone {
  constexpr ratplus::key_runs keys(ratplus::index_t q) const { return {{{q, q + 1, 1}, {0, 0, 1}, {0, 0, 1}}}; }
  constexpr ratplus::index_t last_query(ratplus::index_t key, ratplus::index_t) const { return key; }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::attend_forward(ctx, itself_alone{}, ratplus::attend_forward_args<float>{});
}
