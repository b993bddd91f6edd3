// What XLA calls (see __init__.py).

#include "attention.h"
#include "cached.h"
#include "gates.h"
#include "norms.h"
#include "products.h"
#include "vocabulary.h"

#ifdef NALORA_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_products, nalora::products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("terms")
                                  .Attr<ffi::Span<const int64_t>>("transposed")
                                  .Attr<ffi::Span<const int64_t>>("stacked"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_attention, nalora::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integer>()
                                  .Ret<nalora::Numbers>()
                                  .Ret<nalora::Totals>()
                                  .Attr<float>("cap")
                                  .Attr<bool>("ordered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_attention_gradient, nalora::attention_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integer>()
                                  .Arg<nalora::Numbers>()
                                  .Arg<nalora::Totals>()
                                  .Arg<nalora::Numbers>()
                                  .Ret<nalora::Floats>()
                                  .Ret<nalora::Floats>()
                                  .Ret<nalora::Floats>()
                                  .Attr<float>("cap")
                                  .Attr<bool>("ordered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_over_vocabulary, nalora::over_vocabulary,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Integer>()
                                  .Ret<nalora::Row>()
                                  .Ret<nalora::Row>()
                                  .Ret<nalora::Rows>()
                                  .Attr<bool>("transposed")
                                  .Attr<float>("scale")
                                  .Attr<float>("cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_gate, nalora::gate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Bits1>()
                                  .Arg<nalora::Bits1>()
                                  .Ret<nalora::Bits1>()
                                  .Attr<float>("a")
                                  .Attr<float>("b"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_gate_gradient, nalora::gate_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Bits1>()
                                  .Arg<nalora::Bits1>()
                                  .Arg<nalora::Bits1>()
                                  .Ret<nalora::Bits1>()
                                  .Ret<nalora::Bits1>()
                                  .Ret<nalora::Bits1>()
                                  .Attr<float>("a")
                                  .Attr<float>("b"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_gate_statistics, nalora::gate_statistics,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Indices>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Indices>()
                                  .Arg<nalora::Rows>()
                                  .Arg<nalora::Rows>()
                                  .Arg<nalora::Rows>()
                                  .Arg<nalora::Row>()
                                  .Ret<nalora::Rows>()
                                  .Attr<float>("a")
                                  .Attr<float>("b")
                                  .Attr<float>("low")
                                  .Attr<float>("high"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_gate_measured, nalora::gate_measured,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Rows>()
                                  .Arg<nalora::Rows>()
                                  .Ret<nalora::Matrix>()
                                  .Ret<nalora::Rows>()
                                  .Ret<nalora::Totals>()
                                  .Attr<float>("a")
                                  .Attr<float>("b")
                                  .Attr<float>("low")
                                  .Attr<float>("high"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_cached_attention, nalora::cached_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Totals>()
                                  .Arg<nalora::Totals>()
                                  .Arg<nalora::Totals>()
                                  .Arg<nalora::Stack>()
                                  .Arg<nalora::Stack>()
                                  .Arg<nalora::Integer>()
                                  .Arg<nalora::Indices>()
                                  .Arg<nalora::Indices>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integers>()
                                  .Arg<nalora::Integer>()
                                  .Arg<nalora::Row>()
                                  .Ret<nalora::Totals>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_add_rms, nalora::add_rms,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Rows>()
                                  .Arg<nalora::Rows>()
                                  .Ret<nalora::Rows>()
                                  .Ret<nalora::Matrix>()
                                  .Ret<nalora::Row>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_normalise, nalora::normalise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Row>()
                                  .Ret<nalora::Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_norm_gradient, nalora::norm_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Row>()
                                  .Arg<nalora::Matrix>()
                                  .Arg<nalora::Rows>()
                                  .Ret<nalora::Rows>());

// Asks the kernel for the tiles, once per process; 0 if this process may use them.
extern "C" int nalora_prepare() {
#ifdef NALORA_TILES
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return static_cast<int>(syscall(SYS_arch_prctl, kRequestPermission, kTileData));
#else
  return 0;
#endif
}
