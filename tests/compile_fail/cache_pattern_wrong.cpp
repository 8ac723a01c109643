// expect: ratplus: this type is not a Pattern
#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/model/kv_cache.hpp"

int main() {
  ratplus::reference::context ctx;
  ratplus::kv_cache<float> cache(ctx, {}, 16, 1, 64);
}
