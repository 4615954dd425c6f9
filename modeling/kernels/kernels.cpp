// Decoding and prompts on a CPU. Each function does in one pass over its weights or keys what PyTorch does in tens of
// operations: of a few tokens their dispatch takes longer than their arithmetic, of many the way to memory and back.
// `fused.py` calls them and says what each is equal to; `native.py` builds this file, once for every type that models
// are stored in:
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
#include "indexer.h"
#include "int8.h"
#include "layers.h"
#include "linear.h"
#include "streams.h"
#include "text.h"
#include "text_layer.h"
#include "vectors.h"
