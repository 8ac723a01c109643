// expect: it lacks `key_runs keys(index_t query) const`
// expect: Read ratplus/pattern/concept.hpp
#include "ratplus/backend/reference/attend.hpp"

struct itself_alone {
  constexpr bool sees(ratplus::index_t query, ratplus::index_t key) const { return query == key; }
  constexpr ratplus::index_t last_query(ratplus::index_t key, ratplus::index_t) const { return key; }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::attend_forward(ctx, itself_alone{}, ratplus::attend_forward_args<float>{});
}
