// Packed blocks of float32, float16 and bfloat16 weights.

#include <cstring>

#include "linear.h"

namespace ovfast {

void ConvertToFloat32(WeightKind, const void*, std::int64_t, float*) {}

void PackFloatTile(WeightKind, const float*, std::int64_t, std::uint8_t*) {}

void UnpackFloatRow(const PackedMatrix&, std::int64_t, float*) {}

}  // namespace ovfast
