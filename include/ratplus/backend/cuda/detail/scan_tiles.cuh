#pragma once
// How scans are laid over threads. One thread holds V channels of a head's first half and the V channels half a head
// away, the pairs that RoPE turns into each other; 32 such threads side by side are a column. A tile is R · W rows of a
// column: each of W warps walks R consecutive rows, the warps' affine elements are combined through shared memory, and
// the tiles of a sequence through device memory, by looking back:
//
//   every tile publishes its element (a, b) as soon as it has it, and the constant map (0, state) once it knows the
//   state after its last row. A tile composes its predecessors' elements, latest first, until the composition is
//   constant (a = 0): a finished predecessor or a forgotten past, whichever comes first.
//
// So every row is read once and written once, whatever T is. An element is one 8-byte word, published and read whole,
// so no fence orders anything; a word with all bits set is one that nobody has published. Tiles are handed out by a
// counter, so that a tile's predecessors are always running or done.

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"
#include "ratplus/core/affine.hpp"
#include "ratplus/ops/context.hpp"

namespace ratplus::cuda::detail {

inline constexpr int column_lanes = 32;

/// The extents of a scan as the kernels see them.
struct scan_shape {
  index_t B, H, T, d;
  int half;   // distance of paired channels: ⌈d / 2⌉
  int units;  // threads per head
  int columns_per_sequence;
  index_t columns;  // of all sequences

  scan_shape(const extents<4>& shape, int V)
      : B(shape[0]),
        H(shape[1]),
        T(shape[2]),
        d(shape[3]),
        half(static_cast<int>((d + 1) / 2)),
        units(half / V),
        columns_per_sequence(static_cast<int>(ceil_div(H * units, column_lanes))),
        columns(B * columns_per_sequence) {}
};

/// The channels of one thread.
struct scan_place {
  index_t b, h;
  int channel;  // the first of its lower channels
  bool active;  // false beyond the last column's end
  bool upper;   // whether it has upper channels: false for the middle channel of an odd head

  /// Units: s.units where it is known at compile time, 0 where it is not.
  template <int Units = 0>
  __device__ scan_place(const scan_shape& s, index_t column, int lane, int V, std::integral_constant<int, Units> = {}) {
    const auto number = static_cast<unsigned>(column), per_sequence = static_cast<unsigned>(s.columns_per_sequence);
    const unsigned units = Units > 0 ? Units : static_cast<unsigned>(s.units), sequence = number / per_sequence;
    const unsigned unit = (number - sequence * per_sequence) * column_lanes + static_cast<unsigned>(lane);
    const unsigned head = unit / units;
    b = sequence, h = head;
    channel = static_cast<int>(unit - head * units) * V;
    active = b < s.B && h < s.H;
    if (!active) b = h = 0;
    upper = channel + s.half < s.d;
  }
};

/// Begins to copy Bytes (4, 8, or 16, which pass the first-level cache by) to shared memory; `wait_for_copies` waits
/// for all that this thread began.
template <int Bytes>
__device__ void copy_async(void* to, const void* from) {
  const auto there = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(there), "l"(from), "n"(Bytes) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// What this thread has begun to copy since it last said so becomes a group; waits for all groups but the last Left.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

/// 2 V channels of one row, as stored.
template <class T, int V>
struct alignas(2 * sizeof(raw_channels<T, V>)) row_pair {
  raw_channels<T, V> low, high;

  __device__ float operator[](int i) const { return i < V ? low[i] : high[i - V]; }
  __device__ void widen(float (&x)[2 * V]) const {
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) x[i] = (*this)[i];
  }

  /// From shared memory in one access.
  __device__ row_pair copy() const {
    constexpr int words = static_cast<int>(sizeof(row_pair) / 4);
    row_pair x;
    const auto all = *reinterpret_cast<const packed<unsigned, words>*>(this);
#pragma unroll
    for (int i = 0; i < words / 2; ++i) {
      x.low.word[i] = all.at[i];
      x.high.word[i] = all.at[words / 2 + i];
    }
    return x;
  }

  __device__ void clear() {
#pragma unroll
    for (unsigned& word : low.word) word = 0;
#pragma unroll
    for (unsigned& word : high.word) word = 0;
  }

  /// Makes the compiler compute again, later, what it has computed from this row: results of a whole run of rows, kept
  /// in registers, would leave no room for enough threads.
  __device__ void forget() {
#pragma unroll
    for (unsigned& word : low.word) asm volatile("" : "+r"(word));
#pragma unroll
    for (unsigned& word : high.word) asm volatile("" : "+r"(word));
  }
};

/// Keeps a pointer as it is: the compiler would otherwise compute every row's address anew, from the view's beginning.
template <class T>
__device__ void pin(T*& p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));  // which it can no longer see
}

/// A walk over one thread's channels of the rows of a view. Half: the distance of paired channels where it is known at
/// compile time, 0 where it is not.
template <class T, int V, int Half>
class row_cursor {
  using value = std::remove_const_t<T>;

 public:
  __device__ row_cursor(T* p, index_t stride, int half, bool upper)
      : p_(p), stride_(stride), half_(Half > 0 ? Half : half), upper_(upper) {}

  __device__ void read(row_pair<value, V>& row) const {
    row.low.read(p_);
    if (V > 1 || upper_) row.high.read(p_ + half_);
  }

  /// Begins to read into shared memory.
  __device__ void fetch(row_pair<value, V>& row) const {
    static_assert(V > 1);
    constexpr int bytes = V * static_cast<int>(sizeof(T));
    copy_async<bytes>(&row.low, p_);
    copy_async<bytes>(&row.high, p_ + half_);
  }

  __device__ void write(const float (&x)[2 * V]) const {
    float low[V], high[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      low[i] = x[i];
      high[i] = x[V + i];
    }
    store(p_, low);
    if (V > 1 || upper_) store(p_ + half_, high);
  }

  __device__ void operator++() {
    p_ += stride_;
    pin(p_);
  }
  __device__ void operator--() {
    p_ -= stride_;
    pin(p_);
  }

 private:
  T* p_;
  index_t stride_;
  int half_;
  bool upper_;
};

/// Two walks in step.
template <class Out, class In>
struct both_rows {
  Out out;
  In in;

  __device__ void operator++() {
    ++out;
    ++in;
  }
};
template <class Out, class In>
both_rows(Out, In) -> both_rows<Out, In>;

/// One thread's channels of a (B, H, T, d) view; row 0 is the thread's first.
template <class T, int V, int Half>
class thread_rows {
  using value = std::remove_const_t<T>;

 public:
  __device__ thread_rows(const view<T, 4>& v, const scan_shape& s, const scan_place& at, index_t t0)
      : view_(v), first_(v.row(at.b, at.h, t0) + at.channel), half_(s.half), upper_(at.upper) {}

  __device__ explicit operator bool() const { return static_cast<bool>(view_); }

  __device__ row_cursor<T, V, Half> row(index_t r) const {
    T* p = first_ + r * view_.stride(2);
    pin(p);
    return {p, view_.stride(2), half_, upper_};
  }

  /// Rows first … first + R − 1, of them those with from ≤ r < used; zeros for a stream that is absent.
  template <int R>
  __device__ void read(index_t first, int used, row_pair<value, V> (&rows)[R], int from = 0) const {
    if (view_) {
      auto at = row(first);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r >= from && r < used) at.read(rows[r]);
        if (r + 1 < R) ++at;
      }
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) rows[r].clear();
    }
  }

 private:
  const view<T, 4>& view_;
  T* first_;
  int half_;
  bool upper_;
};

/// Rows of a thread, warps of a block, blocks of a multiprocessor.
template <int R_, int W_, int Blocks>
struct tile_size {
  static constexpr int R = R_, W = W_, blocks = Blocks;
  static constexpr int threads = column_lanes * W, rows = R * W;
};

/// Rows of sequence b in use, and the position of its row 0.
struct scan_rows {
  index_t used, first;
  __device__ scan_rows(const sequence_spans& spans, index_t b, index_t T, bool active)
      : used(active && spans.length ? spans.length[b] : T), first(active && spans.first ? spans.first[b] : 0) {}
};

/// The rows of one tile that a thread holds.
template <class Size>
struct scan_piece {
  index_t t0, position;  // of its first row
  index_t end;           // rows of the sequence in use
  int used, present;     // of Size::R: rows in use, rows within the view

  __device__ scan_piece(const sequence_spans& spans, const scan_shape& s, const scan_place& at, index_t tile) {
    const scan_rows rows(spans, at.b, s.T, at.active);
    t0 = tile * Size::rows + static_cast<int>(threadIdx.x) / column_lanes * Size::R;
    position = rows.first + t0;
    end = rows.used;
    const auto within = [&](index_t n) {
      return static_cast<int>(n - t0 < 0 ? 0 : n - t0 < Size::R ? n - t0 : Size::R);
    };
    used = at.active ? within(end) : 0;
    present = at.active ? within(s.T) : 0;
  }
};

/// The words of a column, one for each channel of keys and values, are shared out to a block's threads: calls
/// f(o, word, chain, i) for the thread's o-th word, which is channel i of its own lane; chain 0 is keys, 1 is values.
template <int N, int Threads>
struct owned_words {
  static constexpr int all = 2 * N * column_lanes;
  static_assert(all % Threads == 0 || Threads % all == 0);
  static constexpr int count = all > Threads ? all / Threads : 1;

  template <class F>
  static __device__ void for_each(F&& f) {
#pragma unroll
    for (int o = 0; o < count; ++o) {
      const int word = o * Threads + static_cast<int>(threadIdx.x);
      if (word < all) f(o, word, word / (N * column_lanes), word / column_lanes % N);
    }
  }
};

/// A channel's value in a (B, H, d) state; 0 when the view is absent. Channel i of the thread.
template <int V>
__device__ index_t channel_of(const scan_shape& s, const scan_place& at, int i) {
  return i < V ? at.channel + i : at.channel + s.half + (i - V);
}
template <int V>
__device__ bool has_channel(const scan_place& at, int i) {
  return at.active && (i < V || V > 1 || at.upper);
}
template <int V>
__device__ float read_state(const view<const float, 3>& state, const scan_shape& s, const scan_place& at, int i) {
  return state && has_channel<V>(at, i) ? state(at.b, at.h, channel_of<V>(s, at, i)) : 0.0f;
}
template <int V>
__device__ void write_state(const view<float, 3>& state, const scan_shape& s, const scan_place& at, int i, float x) {
  if (state && has_channel<V>(at, i)) state(at.b, at.h, channel_of<V>(s, at, i)) = x;
}

/// Cosines and sines of V channels as the table has them.
template <int V>
struct row_angles {
  float cosine[V], sine[V];

  /// x rotated by these angles, or back.
  template <bool Back>
  __device__ void rotate(float (&x)[2 * V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float n = Back ? -sine[i] : sine[i], low = x[i], high = x[V + i];
      x[i] = low * cosine[i] - high * n;
      x[V + i] = high * cosine[i] + low * n;
    }
  }
};

/// A walk over the angles of one thread's channels.
template <int V, int Half>
class angle_cursor {
 public:
  __device__ angle_cursor(const view<const float, 2>& table, const scan_shape& s, const scan_place& at,
                          index_t position)
      : given_(table),
        p_(table.data() + position * table.stride(0) + at.channel),
        stride_(table.stride(0)),
        half_(Half > 0 ? Half : s.half) {
    pin(p_);
  }

  __device__ explicit operator bool() const { return given_; }

  /// x rotated by this row's angles, or back.
  template <bool Back>
  __device__ void rotate(float (&x)[2 * V]) const {
    read().template rotate<Back>(x);
  }

  __device__ row_angles<V> read() const {
    row_angles<V> row;
    read(p_, row.cosine);
    read(p_ + half_, row.sine);
    return row;
  }

  __device__ void operator++() {
    p_ += stride_;
    pin(p_);
  }
  __device__ void operator--() {
    p_ -= stride_;
    pin(p_);
  }

 private:
  static __device__ void read(const float* p, float (&x)[V]) {
    if constexpr (V % 2 == 0) {
#pragma unroll
      for (int i = 0; i < V; i += 2) {
        const float2 pair = __ldg(reinterpret_cast<const float2*>(p + i));
        x[i] = pair.x, x[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = __ldg(p + i);
    }
  }

  bool given_;
  const float* p_;
  index_t stride_;
  int half_;
};

/// Sums over Lanes neighbouring lanes for each of R rows, given row after row by whole warps. They are joined by twos
/// as soon as there are two: each lane keeps the half of its rows that its number says.
template <int Lanes, int R>
class lane_sums {
  static_assert(Lanes >= R);

 public:
  __device__ void add(int row, float x) {
    sum_[row] = x;
#pragma unroll
    for (int n = 1; n < R; n *= 2)
      if ((row + 1) % (2 * n) == 0) {
        float& low = sum_[row + 1 - 2 * n];
        const float high = sum_[row + 1 - n];
        const bool upper = (lane_ & of(n)) != 0;
        low = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, of(n));
      }
  }

  /// f(row, sum), once for each row.
  template <class F>
  __device__ void write(F&& f) {
    int row = 0;
#pragma unroll
    for (int n = 1; n < R; n *= 2) row += (lane_ & of(n)) != 0 ? n : 0;
#pragma unroll
    for (int offset = Lanes / R / 2; offset > 0; offset /= 2) sum_[0] += __shfl_xor_sync(~0u, sum_[0], offset);
    if (lane_ % (Lanes / R) == 0) f(row, sum_[0]);
  }

 private:
  /// The bit of a lane's number by which sums of n rows are joined.
  static constexpr __device__ int of(int n) { return Lanes / 2 / n; }

  int lane_ = static_cast<int>(threadIdx.x % column_lanes);
  float sum_[R];
};

/// Elements of tiles in device memory.
struct tile_elements {
  using word = unsigned long long;
  static constexpr word unpublished = ~word{0};

  word* words = nullptr;       // (tiles − 1, columns, words of a column)
  unsigned* ticket = nullptr;  // begins with all bits set
  index_t stride = 0;          // words of one tile of all columns
  bool in_order = false;       // every tile waits for the one before it

  /// Tile number `tile` in the order of work, word `at` of all columns'.
  __device__ void publish(index_t tile, index_t at, affine<float> e) const {
    word bits = static_cast<word>(__float_as_uint(e.a)) << 32 | __float_as_uint(e.b);
    if (bits == unpublished) bits = 0x7fffffff7fffffffull;  // a NaN in both halves stays one
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(words + tile * stride + at), "l"(bits) : "memory");
  }
  __device__ word peek(index_t tile, index_t at) const {
    word bits;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(words + tile * stride + at) : "memory");
    return bits;
  }

  /// Whether a published map is known not to depend on what is before.
  static __device__ bool constant(word seen) { return seen >> 32 == 0; }

  /// The composition of the tiles before number `tile` at word `at`, latest first, until it is constant or reaches the
  /// first tile, whose published map is constant. In order, it waits for the tile before alone: which tiles are
  /// composed otherwise depends on which are done, and roundings with it.
  __device__ affine<float> look_back(index_t tile, index_t at) const { return look_back(tile, at, peek(tile - 1, at)); }
  /// The same after a first look at tile − 1.
  __device__ affine<float> look_back(index_t tile, index_t at, word first) const {
    if (in_order) {
      while (!constant(first)) {
        __nanosleep(40);
        first = peek(tile - 1, at);
      }
      return {0.0f, __uint_as_float(static_cast<unsigned>(first))};
    }
    constexpr int window = 4;
    auto past = affine<float>::identity();
    for (index_t last = tile - 1; last >= 0; last -= window) {
      word seen[window];
#pragma unroll
      for (int i = 0; i < window; ++i)
        seen[i] = last - i < 0 ? 0 : i == 0 && last == tile - 1 ? first : peek(last - i, at);
#pragma unroll
      for (int i = 0; i < window; ++i) {
        if (last - i < 0) return past;
        while (seen[i] == unpublished) {
          __nanosleep(40);
          seen[i] = peek(last - i, at);
        }
        const affine<float> e{__uint_as_float(static_cast<unsigned>(seen[i] >> 32)),
                              __uint_as_float(static_cast<unsigned>(seen[i]))};
        past = combine(e, past);
        if (past.a == 0.0f) return past;
      }
    }
    return past;
  }

  __device__ void wait_for_first(index_t at) const {
    while (peek(0, at) == unpublished) __nanosleep(40);
  }
};

/// The next tile of the grid, in every thread of the block.
__device__ inline index_t take_ticket(unsigned* counter) {
  __shared__ unsigned taken;
  if (threadIdx.x == 0) taken = atomicAdd(counter, 1u) + 1u;
  __syncthreads();
  return taken;
}

/// Scratch for `tiles` tiles a column: elements and ticket, all bits set.
inline tile_elements make_elements(context& ctx, index_t tiles, index_t columns, index_t words_per_column) {
  tile_elements e;
  e.stride = columns * words_per_column;
  e.in_order = ctx.deterministic;
  const std::size_t bytes = static_cast<std::size_t>((tiles - 1) * e.stride) * sizeof(tile_elements::word) + 256;
  auto* block = static_cast<char*>(ctx.scratch(bytes));
  check(cudaMemsetAsync(block, 0xff, bytes, ctx.stream()), "scan");
  e.ticket = reinterpret_cast<unsigned*>(block);
  e.words = reinterpret_cast<tile_elements::word*>(block + 256);
  return e;
}

}  // namespace ratplus::cuda::detail
