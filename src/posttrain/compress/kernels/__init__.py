"""CPU kernels for packed weights: products that read the weights as they are stored, in few bits.

With one row of inputs, as in decoding, a product costs what reading its weights costs; these read a quarter, an eighth
or less of what bf16 would, and make the values in registers.

| module | kernel |
|---|---|
| `uniform` | integer codes of 1 to 8 bits, a scale and a zero point a group: products and values |
| `table` | codes of 1 to 8 bits with a table of values |
| `trits` | sums of ternary planes, five trits a byte |
| `vectors` | indices into tables of vectors |
| `integers` | products in integers, by inputs of signed bytes |
| `planes` | products of bit planes, for inputs of any number of bits |
| `library` | the shared library (`native/`, plain C), the level of the processor, threads |
| `dispatch` | when a format's product takes its kernel, and the way of many rows |

One library serves all machines: each kernel is there for several levels of the processor (`library.LEVELS`), and picks
one when it runs. `POSTTRAIN_KERNELS=portable|avx2|avx512|off` sets another.
"""
