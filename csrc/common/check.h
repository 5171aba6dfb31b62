// The arguments of an operation, checked with messages that print what came. The public functions in Python validate
// first; these checks keep a direct call of a private op from reading memory it does not own. Methods are constexpr so
// that device code may call them.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>

#define SORA_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace sora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ") with strides (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.stride(i);
  text << (t.is_cpu() ? ") on cpu" : t.is_cuda() ? ") on cuda" : ") on another device");
  return text.str();
}

inline void check_kind(const char* name, const Tensor& t, const Tensor& like, const char* like_name = "x") {
  SORA_CHECK(is_supported(t.scalar_type()), name, ": expected float32, bfloat16 or float16, got ", describe(t));
  SORA_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
             ": expected the device of ", like_name, ", got ", describe(t), "; ", like_name, " is ", describe(like));
}

inline void check_common(const char* name, const Tensor& t, const Tensor& like) {
  check_kind(name, t, like);
  SORA_CHECK(t.dim() > 0 && (t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 || t.numel() == 0), name,
             ": expected a last stride of 1, got ", describe(t));
}

// Tokens [B, S, D], any outer strides.
struct Tokens {
  void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0;

  constexpr explicit operator bool() const { return data != nullptr; }
};

// Modulation rows: token s of S reads row s / (S / F) of its clip. Outer strides may be 0. Each tensor has its own dtype.
struct Rows {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride_b = 0, stride_f = 0;

  constexpr explicit operator bool() const { return data != nullptr; }
};

// One vector [D], contiguous.
struct Vector {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  constexpr explicit operator bool() const { return data != nullptr; }
};

// F is 0 until a modulation tensor names it.
struct Shape {
  int64_t B = 0, S = 0, D = 0, F = 0;

  constexpr int64_t rows() const { return B * S; }
  constexpr int64_t modulation_rows() const { return F ? F : 1; }
  constexpr int64_t rows_per_modulation() const { return S / modulation_rows(); }
};

inline Tokens tokens(const char* name, const Tensor& t, const Tensor& x) {
  check_common(name, t, x);
  SORA_CHECK(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2), name,
             ": expected the shape of x, got ", describe(t), "; x is ", describe(x));
  SORA_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, got ", describe(t), "; x is ",
             describe(x));
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

inline Tokens tokens(const char* name, const OptionalTensor& t, const Tensor& x) {
  return t ? tokens(name, *t, x) : Tokens{};
}

// [D], [B, D] or [B, F, D]. The first of several rows per clip sets shape.F; others must agree. One row serves any F.
inline Rows rows(const char* name, const OptionalTensor& t, const Tensor& x, Shape& shape) {
  if (!t) return {};
  check_common(name, *t, x);
  const int64_t dim = t->dim(), F = dim == 3 ? t->size(1) : 1;
  SORA_CHECK(dim <= 3 && (dim == 1 || t->size(0) == shape.B) && t->size(dim - 1) == shape.D, name,
             ": expected (D,), (B, D) or (B, F, D) with B = ", shape.B, " and D = ", shape.D, ", got ", describe(*t));
  SORA_CHECK(F > 0 ? shape.S % F == 0 : shape.S == 0, name, ": expected a number of rows per clip that divides S = ", shape.S,
             ", got ", describe(*t));
  SORA_CHECK(F == 1 || shape.F == 0 || F == shape.F, name, ": expected F = ", shape.F,
             " as in the other modulation, got ", describe(*t));
  if (F > 1) shape.F = F;
  return {t->data_ptr(), t->scalar_type(), dim == 1 ? 0 : t->stride(0), F == 1 ? 0 : t->stride(1)};
}

// The gradient of rows, (B, F, D), of the F that the call has.
inline Rows row_gradients(const char* name, const OptionalTensor& t, const Tensor& x, Shape& shape) {
  if (!t || t->numel() == 0) return {};
  const Rows found = rows(name, t, x, shape);
  if (shape.F == 0) shape.F = 1;
  SORA_CHECK(t->dim() == 3 && t->size(1) == shape.F, name, ": expected (B, F, D) = (", shape.B, ", ", shape.F, ", ",
             shape.D, "), got ", describe(*t));
  return found;
}

inline Vector vector(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  check_common(name, *t, x);
  SORA_CHECK(t->dim() == 1 && t->size(0) == x.size(2), name, ": expected (", x.size(2), ",), got ", describe(*t));
  return {t->data_ptr(), t->scalar_type()};
}

inline Shape shape_of(const char* name, const Tensor& x) {
  SORA_CHECK(x.dim() == 3, name, ": expected (B, S, D), got ", describe(x));
  check_common(name, x, x);
  return {x.size(0), x.size(1), x.size(2)};
}

}  // namespace sora
