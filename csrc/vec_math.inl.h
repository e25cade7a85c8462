// Functions of a Vec, in float32 and without a branch. NaN in, NaN out.

OVFAST_INLINE Vec Magnitude(Vec x) { return Max(x, Sub(Zero(), x)); }

// e to the x, to about one unit in the last place: x = n · ln 2 + r, and 2 to the n in two factors,
// so that it may be a subnormal number. 0 from -104 down, inf from 88.73 up.
OVFAST_INLINE Vec Exp(Vec x) {
  x = Min(Set(89.0f), Max(Set(-105.0f), x));  // the second operand wins where one is NaN
  const Vec magic = Set(12582912.0f);         // 1.5 · 2²³: the sum has n in its lowest bits
  const Vec shifted = Fma(x, Set(1.44269504f), magic);
  const Vec n = Sub(shifted, magic);
  // The first part of ln 2 has ten bits: its product with n is exact without a fused operation.
  Vec r = Fma(n, Set(-0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.9875691500e-4f);
  p = Fma(p, r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  p = Add(Fma(p, Mul(r, r), r), Set(1.0f));
  const VecI power = SubI(AsInt(shifted), AsInt(magic));
  const VecI half = ShiftRight<1>(power);
  const VecI one = AsInt(Set(1.0f));
  const Vec scale = AsFloat(AddI(ShiftLeft<23>(half), one));
  const Vec rest = AsFloat(AddI(ShiftLeft<23>(SubI(power, half)), one));
  return Mul(Mul(p, scale), rest);
}

// x · sigmoid(x).
OVFAST_INLINE Vec Silu(Vec x) { return Div(x, Add(Set(1.0f), Exp(Sub(Zero(), x)))); }

// 0.5 · x · (1 + tanh u), u = √(2/π) · (x + 0.044715 · x³), without the cancellation of 1 + tanh.
OVFAST_INLINE Vec GeluTanh(Vec x) {
  const Vec cubic = Fma(Mul(x, x), Set(0.044715f), Set(1.0f));
  const Vec minus_two_u = Mul(Mul(x, Set(-1.59576912f)), cubic);
  return Div(x, Add(Set(1.0f), Exp(minus_two_u)));
}

// x · Φ(x) = max(x, 0) - |x| · Φ(-|x|), Φ the normal distribution; no cancellation on either side.
// Φ(-a) = exp(-a²/2) · t · P(t) with t = 1 / (1 + 0.35 · a), P fitted to 3.2e-8 on 0 ≤ a ≤ 15.
OVFAST_INLINE Vec GeluErf(Vec x) {
  const Vec positive = Max(Zero(), x);
  const Vec a = Min(Set(15.0f), Magnitude(x));  // Φ(-15) is 0 in float32
  const Vec t = Div(Set(1.0f), Fma(a, Set(0.35f), Set(1.0f)));
  Vec p = Set(-0.02916393079f);
  p = Fma(p, t, Set(0.14406083300f));
  p = Fma(p, t, Set(-0.25590194091f));
  p = Fma(p, t, Set(0.15939301692f));
  p = Fma(p, t, Set(-0.02326391932f));
  p = Fma(p, t, Set(0.10557484222f));
  p = Fma(p, t, Set(0.11981548681f));
  p = Fma(p, t, Set(0.13986433779f));
  p = Fma(p, t, Set(0.13962125829f));
  const Vec tail = Mul(Mul(p, t), Exp(Mul(Mul(a, a), Set(-0.5f))));
  return Fma(Sub(Zero(), a), tail, positive);
}
