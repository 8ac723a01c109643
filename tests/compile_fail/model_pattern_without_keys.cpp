// expect: it lacks `key_runs keys(index_t query) const`
#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/model/language_model.hpp"
#include "ratplus/recurrence/gated_average.hpp"

struct itself_alone {
  constexpr bool sees(ratplus::index_t query, ratplus::index_t key) const { return query == key; }
  constexpr ratplus::index_t last_query(ratplus::index_t key, ratplus::index_t) const { return key; }
};

int main() {
  ratplus::reference::context ctx;
  ratplus::language_model<ratplus::gated_average> model(ctx, {});
  model.forward(ctx, itself_alone{}, {}, {});
}
