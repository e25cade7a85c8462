// Packed blocks of int8 and int4 weights.

#include "linear.h"

namespace ovfast {

void PackQuantizedTile(WeightKind, const float*, std::int64_t, std::uint8_t*) {}

void UnpackQuantizedRow(const PackedMatrix&, std::int64_t, float*) {}

}  // namespace ovfast
