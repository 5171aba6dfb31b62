// The modulation of one row of tokens, as the inner loops of the family read it.

#pragma once

#include "common/loops.h"
#include "common/memory.h"
#include "common/rows.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace sora {
namespace {

// What one kernel serves: a dtype, the operations, whether every token has modulation rows of its own, whether y has a
// norm.
template <class Element, bool gate, bool norm, bool own, bool norm_y>
struct Case {
  using T = Element;
  static constexpr bool kGate = gate, kNorm = norm, kOwn = own, kNormY = norm_y;
};

// Runs kernel(Case<...>) for the case at hand.
template <bool kGate, bool kNorm, class T, class Kernel>
void with_case(bool own, bool norm_y, const Kernel& kernel) {
  if constexpr (kGate) {
    if (norm_y) return kernel(Case<T, kGate, kNorm, false, true>{});
  }
  own ? kernel(Case<T, kGate, kNorm, true, false>{}) : kernel(Case<T, kGate, kNorm, false, false>{});
}

// Which modulation row a token has, where that is not told by its place: [B, S] of int32 or int64, any strides.
struct Index {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride_b = 0, stride_s = 0;

  explicit operator bool() const { return data != nullptr; }
  int64_t operator()(int64_t b, int64_t s) const {
    const int64_t at = b * stride_b + s * stride_s;
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

inline Index index_of(const OptionalTensor& t, const Tensor& x, const Shape& shape) {
  if (!t || shape.rows() == 0) return {};
  const bool wide = t->scalar_type() == ScalarType::Long;
  SORA_CHECK(wide || t->scalar_type() == ScalarType::Int, "index: expected int32 or int64, got ", describe(*t));
  SORA_CHECK(t->is_cpu() == x.is_cpu() && t->dim() == 2 && t->size(0) == shape.B && t->size(1) == shape.S,
             "index: expected (B, S) = (", shape.B, ", ", shape.S, ") on the device of x, got ", describe(*t));
  const Index index{t->data_ptr(), wide, t->stride(0), t->stride(1)};
  for (int64_t b = 0; b < shape.B; ++b) {
    for (int64_t s = 0; s < shape.S; ++s) {
      const int64_t row = index(b, s);
      SORA_CHECK(row >= 0 && row < shape.modulation_rows(), "index: expected rows of 0 to ", shape.modulation_rows() - 1,
                 ", got ", row, " at (", b, ", ", s, ")");
    }
  }
  return index;
}

// The tokens in the order of their modulation rows, a stable one: those of row f of clip b, which is group
// b * F + f, are tokens[starts[group]] up to tokens[starts[group + 1]], each b * S + s.
struct Runs {
  std::vector<int64_t> starts, tokens;

  Runs(const Index& index, const Shape& shape) : starts(shape.B * shape.modulation_rows() + 1), tokens(shape.rows()) {
    const auto group = [&](int64_t row) {
      return row / shape.S * shape.modulation_rows() + index(row / shape.S, row % shape.S);
    };
    for (int64_t row = 0; row < shape.rows(); ++row) ++starts[group(row) + 1];
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t row = 0; row < shape.rows(); ++row) tokens[next[group(row)]++] = row;
  }
};

struct Modulation {
  Rows gate, shift, scale;
  Vector weight, bias, gate_table, shift_table, scale_table;
};

// The shape that rows are checked against. Where an index chooses among them any number will do: all divide 0 tokens.
inline Shape of_rows(const Shape& shape, const OptionalTensor& index) {
  return {shape.B, index ? 0 : shape.S, shape.D, shape.F};
}

inline Modulation modulation(const Tensor& x, Shape& shape, const OptionalTensor& index, const OptionalTensor& gate,
                             const OptionalTensor& shift, const OptionalTensor& scale, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& gate_table,
                             const OptionalTensor& shift_table, const OptionalTensor& scale_table) {
  Shape like = of_rows(shape, index);
  const Modulation found{rows("gate", gate, x, like),
                         rows("shift", shift, x, like),
                         rows("scale", scale, x, like),
                         vector("weight", weight, x),
                         vector("bias", bias, x),
                         vector("gate_table", gate_table, x),
                         vector("shift_table", shift_table, x),
                         vector("scale_table", scale_table, x)};
  shape.F = like.F;
  return found;
}

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
    if constexpr (C::kGate) start(1, from.gate || from.gate_table ? 0.0f : 1.0f, from.gate_table);
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
