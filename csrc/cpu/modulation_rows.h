// The modulation of one row of tokens, as the inner loops of the family read it.

#pragma once

#include "common/loops.h"
#include "common/memory.h"
#include "common/rows.h"

#include <algorithm>

namespace sora {
namespace {

// What one kernel serves: a dtype, the operations, and whether every token has modulation rows of its own.
template <class Element, bool gate, bool norm, bool own>
struct Case {
  using T = Element;
  static constexpr bool kGate = gate, kNorm = norm, kOwn = own;
};

struct Modulation {
  Rows gate, shift, scale;
  Vector weight, bias, gate_table, shift_table, scale_table;
};

// What the inner loops read, in fp32. Where tokens share a row it is worked out once, in scratch rows. Where every token
// has a row of its own (kOwn), the row is read where it lies, and only what is not fp32 is copied.
template <bool kOwn>
struct ModulationRow {
  const float *weight, *bias, *gate_table, *scale_table, *shift_table;  // scale_table: 1 + table
  const float *gate_row, *scale_row, *shift_row, *mul_row;

  // gate + table; 1 + scale + table; weight * scale; bias * scale + shift + table
  template <class At>
  SORA_INLINE auto gate(At at) const {
    if constexpr (kOwn) return at(gate_table) + at(gate_row);
    else return at(gate_row);
  }

  template <class At>
  SORA_INLINE auto scale(At at) const {
    if constexpr (kOwn) return at(scale_table) + at(scale_row);
    else return at(scale_row);
  }

  template <class At>
  SORA_INLINE auto mul(At at) const {
    if constexpr (kOwn) return at(weight) * scale(at);
    else return at(mul_row);
  }

  template <class At>
  SORA_INLINE auto shift(At at) const {
    if constexpr (kOwn) return at(bias) * scale(at) + (at(shift_table) + at(shift_row));
    else return at(shift_row);
  }
};

template <int V, class C>
class ModulationRows {
 public:
  using Row = ModulationRow<C::kOwn>;

  ModulationRows(const Modulation& from, int64_t D) : from_(from), D_(D), scratch_(10, D) {
    if (C::kOwn) std::fill_n(zeros(), D, 0.0f);
    if constexpr (C::kGate) start(1, 0.0f, from.gate_table);
    if constexpr (C::kNorm) {
      start(2, 1.0f, from.scale_table), start(3, 0.0f, from.shift_table);
      start(4, from.weight ? 0.0f : 1.0f, from.weight), start(5, 0.0f, from.bias);
    }
  }

  SORA_INLINE Row load(int64_t b, int64_t f) const {
    Row row{scratch_.row(4), scratch_.row(5), scratch_.row(1), scratch_.row(2), scratch_.row(3)};
    if constexpr (C::kGate) row.gate_row = read(from_.gate, row.gate_table, scratch_.row(6), b, f);
    if constexpr (C::kNorm) {
      row.scale_row = read(from_.scale, row.scale_table, scratch_.row(7), b, f);
      row.shift_row = read(from_.shift, row.shift_table, scratch_.row(8), b, f);
    }
    if constexpr (C::kNorm && !C::kOwn) {
      float *mul = scratch_.row(9), *shift = scratch_.row(8);
      row.mul_row = mul;
      each<V>(D_, [=](auto at) SORA_LAMBDA {
        at.put(mul, at(row.weight) * at(row.scale_row));
        at.put(shift, at(shift) + at(row.bias) * at(row.scale_row));
      });
    }
    return row;
  }

 private:
  float* zeros() const { return scratch_.row(0); }

  SORA_INLINE void start(int64_t row, float value, const Vector& plus) const {
    std::fill_n(scratch_.row(row), D_, value);
    add(scratch_.row(row), plus, D_);
  }

  SORA_INLINE const float* read(const Rows& from, const float* table, float* copy, int64_t b, int64_t f) const {
    if (C::kOwn && !from) return zeros();
    float* const row = C::kOwn ? in_place(from, copy, b, f) : copy;
    if (row == copy) add(copy, C::kOwn ? zeros() : table, from, b, f, D_);
    return row;
  }

  const Modulation& from_;
  int64_t D_;
  Scratch scratch_;
};

}  // namespace
}  // namespace sora
