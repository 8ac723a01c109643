#pragma once
// Repeating a step of many small operations, such as decoding one token, without paying for each again.

#include "ratplus/ops/context.hpp"

namespace ratplus {

/// Does what f() queues. A context that can record (CUDA) runs it once, records it the second time and replays the
/// recording from then on; others run it every time. So f must queue the same operations on the same memory each time,
/// allocate nothing after its first run, read no result on the host and change no host state. `recording` belongs to
/// this f.
template <Context Ctx, class F>
void replay(Ctx& ctx, typename Ctx::recording& recording, F&& f) {
  replay_on(ctx, recording, std::forward<F>(f));
}

}  // namespace ratplus
