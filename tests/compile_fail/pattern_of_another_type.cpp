// expect: ratplus: this type is not a Pattern
#include "ratplus/backend/reference/attend.hpp"

int main() {
  ratplus::reference::context ctx;
  ratplus::attend_forward(ctx, 16, ratplus::attend_forward_args<float>{});
}
