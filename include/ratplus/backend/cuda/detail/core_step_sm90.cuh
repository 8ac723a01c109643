#pragma once
// A decoding step's core on Hopper, for as many rows as fill the card: blocks stay and walk over the rows. One warp has
// the copy engine bring chunks of keys and values into a ring, running ahead across the ends of rows, so that the
// memory is busy while the others do a row's recurrence or finish it.

#include "ratplus/backend/cuda/detail/core_step.cuh"
#include "ratplus/backend/cuda/detail/hopper.cuh"

namespace ratplus::cuda::detail {

/// A block's ring. Four of 32 KB on their way to a multiprocessor are quicker than three of 64 KB, beside which the
/// next kernel's blocks find no room.
template <class L, class KV>
struct core_ring {
  static constexpr int blocks = 4, stages = 2;  // blocks of a multiprocessor
  static constexpr int chunk = L::keys * L::batch * decode_warps;
  static constexpr int tile_bytes = chunk * L::size * static_cast<int>(sizeof(KV));  // keys or values of a chunk
  static constexpr int shared_bytes = stages * 2 * tile_bytes;
};

/// What a stage of the ring holds.
struct core_stage {
  int keys;          // that exist
  bool last, own;    // of its unit; the row's own key counts, too
  index_t homes[3];  // of the row
};

template <class L, class C, class Heads, class T, class KV>
__global__ void __launch_bounds__(decode_threads + 32, core_ring<L, KV>::blocks)
    core_stream_kernel(C cell, Heads heads, core_forward_args<T, KV> p, decode_partials parts) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using R = core_ring<L, KV>;
  extern __shared__ __align__(128) char ring[];
  __shared__ hopper::barrier full[R::stages], empty[R::stages];
  __shared__ core_stage stages[R::stages];
  __shared__ step_row<T, L::size> row;
  const index_t B = p.q.extent(0), H = p.q.extent(1), d = p.q.extent(3), units = B * H * parts.splits;
  const core_memory<T, KV>& memory = p.memory;
  const attend_forward_args<T, KV> attend = row.attention(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::stages; ++i) {
      full[i].init(1);
      empty[i].init(decode_warps);
    }
    hopper::publish_barriers();
  }
  __syncthreads();
  const int lane_id = threadIdx.x % 32, warp = threadIdx.x / 32;
  hopper::ring_place<R::stages> place;

  if (warp == decode_warps) {
    __shared__ row_segments<T, KV> segments;
    __shared__ index_t homes[3];
    const std::uint64_t policy = hopper::read_once();
    const int bytes = static_cast<int>(d) * static_cast<int>(sizeof(KV));  // of a key
    bool used = false;
    for (index_t u = blockIdx.x; u < units; u += gridDim.x) {
      const index_t split = u % parts.splits, h = u / parts.splits % H, b = u / parts.splits / H;
      // Asked for at once: each is a long way off.
      const token_t length = memory.spans.length ? memory.spans.length[b] : 1, position = memory.spans.first[b];
      const head_slots head = memory.heads[h];
      if (length == 0) continue;
      __syncwarp();
      if (lane_id < key_runs::count) {
        find_segments(heads, attend, b, h, index_t{0}, lane_id, segments);
        homes[lane_id] = home_in_pool(head, position, lane_id);
      }
      __syncwarp();
      int chunks = 0, fresh = 0;
      const auto chunks_of = [](const key_segment<KV>& s) { return static_cast<int>(ceil_div(s.count, R::chunk)); };
      for (const auto& segment : segments.past) chunks += chunks_of(segment);
      for (const auto& segment : segments.fresh) fresh += static_cast<int>(segment.count);
      const int begin = static_cast<int>(chunks * split / parts.splits),
                end = static_cast<int>(chunks * (split + 1) / parts.splits);
      const key_segment<KV>* segment = segments.past;
      int skip = begin;  // chunks of this segment
      for (int c = begin; c < end || c == begin; ++c) {
        key_segment<KV> from{};
        int n = 0;
        if (c < end) {
          for (; skip >= chunks_of(*segment); ++segment) skip -= chunks_of(*segment);
          const index_t at = index_t{skip++} * R::chunk, left = segment->count - at;
          from = *segment;
          from.k += at * from.k_stride;
          from.v += at * from.v_stride;
          n = static_cast<int>(left < R::chunk ? left : R::chunk);
        }
        if (used) empty[place.stage].wait(place.parity ^ 1);
        hopper::barrier& done = full[place.stage];
        if (lane_id == 0) {
          const bool last = c + 1 >= end;
          stages[place.stage] = {
              n, last, last && split + 1 == parts.splits && fresh > 0, {homes[0], homes[1], homes[2]}};
          done.arrive_expecting(2 * n * bytes);
        }
        __syncwarp();
        char *const k = ring + place.stage * 2 * R::tile_bytes, *const v = k + R::tile_bytes;
        if (n > 0 && from.k_stride == d && from.v_stride == d) {
          if (lane_id == 0) hopper::load_bytes(k, from.k, n * bytes, done, policy);
          if (lane_id == 1) hopper::load_bytes(v, from.v, n * bytes, done, policy);
        } else {
          for (int i = lane_id; i < n; i += 32) {
            hopper::load_bytes(k + i * bytes, from.k + i * from.k_stride, bytes, done, policy);
            hopper::load_bytes(v + i * bytes, from.v + i * from.v_stride, bytes, done, policy);
          }
        }
        place.advance();
        used = used || place.stage == 0;
      }
    }
    return;
  }

  wait_for_previous();
  for (index_t u = blockIdx.x; u < units; u += gridDim.x) {
    const index_t split = u % parts.splits, h = u / parts.splits % H, b = u / parts.splits / H;
    const token_t length = memory.spans.length ? memory.spans.length[b] : 1, position = memory.spans.first[b];
    const T* const gate = p.out_gate.row(b) + h * d;
    T* const y = p.y.row(b) + h * d;
    if (length == 0) {
      if (split == 0)
        for (index_t c = threadIdx.x; c < d; c += decode_threads) y[c] = from_float<T>(0.0f);
      continue;
    }
    sync_decoding();  // the row before is done with
    row.fill(cell, p, b, h, position);
    sync_decoding();
    float q[L::channels];
    scaled_query<L>(attend, b, h, 0, q);
    partial_softmax<L::channels> state;
    core_stage stage;
    do {
      full[place.stage].wait(place.parity);
      stage = stages[place.stage];
      const char* const k = ring + place.stage * 2 * R::tile_bytes;
      if (constexpr int each = L::keys * L::batch; warp * each < stage.keys) {
        key_chunk<L, KV> chunk;
        chunk.read({reinterpret_cast<const KV*>(k), reinterpret_cast<const KV*>(k + R::tile_bytes), d, d, stage.keys},
                   warp * each, d);
        chunk.add_to(state, q);
      }
      __syncwarp();
      if (lane_id == 0) empty[place.stage].arrive();
      place.advance();
    } while (!stage.last);
    if (stage.own && warp == decode_warps - 1) {  // which has the fewest keys
      key_chunk<L, T> chunk;
      chunk.read({row.k, row.v, d, d, 1}, 0, d);
      chunk.add_to(state, q);
    }
    __shared__ block_partials<L> block;
    leave_partial<L>(state, block);
    sync_decoding();
    const bool finished = finish_row(block, attend, b, h, 0, static_cast<int>(split), parts, [&](index_t c, float x) {
      y[c] = from_float<T>(to_float(from_float<T>(x)) * fast_sigmoid(to_float(gate[c])));
    });
    if (finished) row.template keep<C>(p, b, h, stage.homes);
  }
#endif
}

/// Queues a step as above; false where it is not served: fewer rows, other alignment or hardware.
template <class L, class C, class Heads, class T, class KV>
[[nodiscard]] bool run_core_stream(context& ctx, const C& cell, const Heads& heads, const core_forward_args<T, KV>& p,
                                   index_t slots) {
  using R = core_ring<L, KV>;
  if constexpr (L::vector == widest<KV> && L::size <= 128) {
    const index_t rows = p.q.extent(0) * p.q.extent(1), capacity = index_t{R::blocks} * ctx.multiprocessors();
    const auto kernel = core_stream_kernel<L, C, Heads, T, KV>;
    if (ctx.properties().major != 9 || rows < ctx.multiprocessors() || !hopper::compiled(kernel)) return false;
    // A row is split only where there are fewer rows than blocks: the beginning and the end of a unit cost its block
    // microseconds, more than a finer balance of long rows gains.
    const index_t chunks = ceil_div(slots, R::chunk);
    const index_t splits = std::max<index_t>(std::min(capacity / rows, chunks), 1);
    const decode_partials parts =
        splits > 1 ? make_partials<L>(ctx, rows, splits) : decode_partials{nullptr, nullptr, 1};
    launch_overlapped(ctx, "core", kernel, dim3(static_cast<unsigned>(std::min(capacity, rows * splits))),
                      dim3(decode_threads + 32), static_cast<std::size_t>(R::shared_bytes), cell, heads, p, parts);
    return true;
  }
  return false;
}

}  // namespace ratplus::cuda::detail
