// Decoding and prompts on a CPU. Each function does in one pass over its weights or keys what PyTorch does in tens of
// operations: of a few tokens their dispatch takes longer than their arithmetic, of many the way to memory and back.
// `native_functions.py` calls them and says what each is equal to; `native_build.py` builds this file, once for every
// type that models are stored in:
//
//     -DNUMBER=float     fp32
//     -DNUMBER=bf16      bfloat16; products are summed in fp32
//
// A token's result does not depend on the tokens beside it, nor on the number of threads: a text read one by one and a
// few at a time comes out the same to the last bit. More than MANY tokens are multiplied in another order
// (`columns.h`).
//
// Shapes: N tokens, B sequences of T tokens each, H heads, D and W widths of heads and keys, S keys, n residual
// streams, d the model's width. Matrices are stored as PyTorch stores those of linear maps: [out, in], row after row.

#include "attention.h"
#include "experts.h"
#include "failures.h"
#include "indexer.h"
#include "int8.h"
#include "layers.h"
#include "linear.h"
#include "streams.h"
#include "text.h"
#include "text_layer.h"
#include "vectors.h"

namespace {

// A function for Python: what it is called, where it is, and what it takes, one letter for each argument.
struct Entry {
  const char* name;
  const void* address;
  const char* arguments;
};

// A structure that Python fills, and its bytes.
struct Mirrored {
  const char* name;
  Size bytes;
};

#define FUNCTION(name) {#name, reinterpret_cast<const void*>(&Exported<&name>::call), Exported<&name>::kinds}
#define STRUCTURE(name) {#name, sizeof(name)}

}  // namespace

// What `native_library.py` reads when it loads the library, instead of having a second list of all functions. The
// number is raised when an argument or a field gets another meaning, which no kind and no size tells.
extern "C" {

extern const Size fathom_version, fathom_function_count, fathom_structure_count;
extern const Entry fathom_functions[];
extern const Mirrored fathom_structures[];

const Size fathom_version = 1;
const Entry fathom_functions[] = {
    FUNCTION(project),        FUNCTION(project_groups),  FUNCTION(norm_rotate),      FUNCTION(angles),
    FUNCTION(attend_latents), FUNCTION(attend_shared),   FUNCTION(attend_text),      FUNCTION(choose_keys),
    FUNCTION(route),          FUNCTION(mix_channels),    FUNCTION(read_streams),     FUNCTION(write_streams),
    FUNCTION(project_int8),   FUNCTION(mix_int8),        FUNCTION(decode_layer),     FUNCTION(read_layer),
    FUNCTION(remember_text),  FUNCTION(decode_channels), FUNCTION(begin_compressed), FUNCTION(end_compressed),
};
const Mirrored fathom_structures[] = {
    STRUCTURE(Matrix),  STRUCTURE(Connection),   STRUCTURE(LatentAttention),
    STRUCTURE(Indexer), STRUCTURE(ChannelMixer), STRUCTURE(CompressedAttention),
    STRUCTURE(Layer),   STRUCTURE(Cache),        STRUCTURE(Memory),
    STRUCTURE(Between), STRUCTURE(Step),
};
const Size fathom_function_count = std::size(fathom_functions);
const Size fathom_structure_count = std::size(fathom_structures);

}  // extern "C"
