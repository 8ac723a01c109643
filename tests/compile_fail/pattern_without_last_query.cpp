// expect: it lacks `index_t last_query(index_t key, index_t T) const`
// expect: Read ratplus/pattern/concept.hpp
#include "ratplus/backend/reference/attend.hpp"

struct itself_alone {
  constexpr bool sees(ratplus::index_t query, ratplus::index_t key) const { return query == key; }
  constexpr ratplus::key_runs keys(ratplus::index_t q) const { return {{{q, q + 1, 1}, {0, 0, 1}, {0, 0, 1}}}; }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::attend_backward(ctx, itself_alone{}, ratplus::attend_backward_args<float>{});
}
