// The functions that XLA calls (__init__.py). Operands are bound by the types of the parameters, attributes by name.

#include "attention.h"
#include "products.h"
#include "vocabulary.h"

#ifdef NALORA_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

template <>
struct xla::ffi::CtxBinding<nalora::Pool> {
  using Ctx = xla::ffi::ThreadPool;
};

using xla::ffi::StructMember;
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(nalora::Seen, StructMember<float>("cap"), StructMember<bool>("ordered"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(nalora::Logits, StructMember<bool>("transposed"), StructMember<float>("scale"),
                                      StructMember<float>("cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_products, nalora::products,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<nalora::Counts>("terms")
                                  .Attr<nalora::Counts>("transposed")
                                  .Attr<nalora::Counts>("stacked"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_attention, nalora::attention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_attention_gradient, nalora::attention_gradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nalora_over_vocabulary, nalora::over_vocabulary);

// Asks the operating system for the tiles, once per process; returns 0 if this process may use them.
extern "C" int nalora_prepare() {
#ifdef NALORA_TILES
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return static_cast<int>(syscall(SYS_arch_prctl, kRequestPermission, kTileData));
#else
  return 0;
#endif
}
