// Sixteen floats, or sixteen 32-bit integers, in plain C++: what runs on any CPU, and what the
// operations of the other vec_*.inl.h mean.

struct Vec {
  float v[16];
};
struct VecI {
  std::int32_t v[16];
};

constexpr int kLanes = 16;
constexpr int kTileRows = 4;    // of a register tile
constexpr int kTileBlocks = 1;  // of 16 columns

template <class Function>
OVFAST_INLINE Vec Each(const Function& f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
template <class Function>
OVFAST_INLINE VecI EachI(const Function& f) {
  VecI out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
OVFAST_INLINE Vec Set(float x) {
  return Each([&](int) { return x; });
}
OVFAST_INLINE Vec Zero() { return Set(0.0f); }
OVFAST_INLINE Vec Load(const float* p) {
  return Each([&](int i) { return p[i]; });
}
OVFAST_INLINE void Store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
// The first `count` lanes, 0 in the rest; memory behind them is not touched. Any count.
OVFAST_INLINE Vec LoadPart(const float* p, int count) {
  return Each([&](int i) { return i < count ? p[i] : 0.0f; });
}
OVFAST_INLINE void StorePart(float* p, Vec a, int count) {
  for (int i = 0; i < kLanes && i < count; ++i) p[i] = a.v[i];
}
OVFAST_INLINE Vec Add(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] + b.v[i]; });
}
OVFAST_INLINE Vec Sub(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] - b.v[i]; });
}
OVFAST_INLINE Vec Mul(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] * b.v[i]; });
}
OVFAST_INLINE Vec Div(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] / b.v[i]; });
}
// a · b + c; here in two roundings, elsewhere in one.
OVFAST_INLINE Vec Fma(Vec a, Vec b, Vec c) {
  return Each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
OVFAST_INLINE Vec Max(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
OVFAST_INLINE Vec Min(Vec a, Vec b) {
  return Each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Of all lanes, halves added to halves.
OVFAST_INLINE float Sum(Vec a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
OVFAST_INLINE float MaxOf(Vec a) {
  float most = a.v[0];
  for (int i = 1; i < kLanes; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
OVFAST_INLINE VecI SetI(std::int32_t x) {
  return EachI([&](int) { return x; });
}
OVFAST_INLINE VecI ZeroI() { return SetI(0); }
OVFAST_INLINE VecI LoadI(const void* p) {
  VecI out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
OVFAST_INLINE void StoreI(void* p, VecI a) { std::memcpy(p, a.v, sizeof(a.v)); }
OVFAST_INLINE std::int32_t Wrap(std::uint32_t x) { return static_cast<std::int32_t>(x); }
OVFAST_INLINE std::uint32_t Bits(std::int32_t x) { return static_cast<std::uint32_t>(x); }
OVFAST_INLINE VecI AddI(VecI a, VecI b) {
  return EachI([&](int i) { return Wrap(Bits(a.v[i]) + Bits(b.v[i])); });
}
OVFAST_INLINE VecI SubI(VecI a, VecI b) {
  return EachI([&](int i) { return Wrap(Bits(a.v[i]) - Bits(b.v[i])); });
}
OVFAST_INLINE VecI AndI(VecI a, VecI b) {
  return EachI([&](int i) { return a.v[i] & b.v[i]; });
}
OVFAST_INLINE VecI XorI(VecI a, VecI b) {
  return EachI([&](int i) { return a.v[i] ^ b.v[i]; });
}
template <int kBits>
OVFAST_INLINE VecI ShiftLeft(VecI a) {
  return EachI([&](int i) { return Wrap(Bits(a.v[i]) << kBits); });
}
// Copies the sign.
template <int kBits>
OVFAST_INLINE VecI ShiftRight(VecI a) {
  return EachI([&](int i) { return a.v[i] >> kBits; });
}
template <int kBits>
OVFAST_INLINE VecI ShiftRightUnsigned(VecI a) {
  return EachI([&](int i) { return Wrap(Bits(a.v[i]) >> kBits); });
}
OVFAST_INLINE Vec ToFloat(VecI a) {
  return Each([&](int i) { return static_cast<float>(a.v[i]); });
}
// To the nearest, halves to even; the lanes lie in the range of int32.
OVFAST_INLINE VecI RoundToInt(Vec a) {
  return EachI([&](int i) { return static_cast<std::int32_t>(__builtin_rintf(a.v[i])); });
}
// The same bits as the other type.
OVFAST_INLINE Vec AsFloat(VecI a) {
  return Each([&](int i) { return OfBits(Bits(a.v[i])); });
}
OVFAST_INLINE VecI AsInt(Vec a) {
  return EachI([&](int i) { return Wrap(BitsOf(a.v[i])); });
}
// Sixteen float16.
OVFAST_INLINE Vec LoadHalf(const std::uint16_t* p) {
  return Each([&](int i) { return FromHalf(p[i]); });
}
// Sixteen bfloat16.
OVFAST_INLINE Vec LoadBrain(const std::uint16_t* p) {
  return Each([&](int i) { return FromBrain(p[i]); });
}

#include "bytes_scalar.inl.h"
// out[col][row] = in[row][col] for 8 columns; rows from num_rows (1 to 8) on repeat the last.
OVFAST_INLINE void Transpose8(const float* in, std::int64_t in_stride, std::int64_t num_rows,
                              float* out, std::int64_t out_stride) {
  for (std::int64_t row = 0; row < 8; ++row) {
    const float* const from = in + (row < num_rows ? row : num_rows - 1) * in_stride;
    for (std::int64_t col = 0; col < 8; ++col) out[col * out_stride + row] = from[col];
  }
}
