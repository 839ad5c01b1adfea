// A training step as one kernel of one block; see cupy_math.cu, and InOneBlock in cupy_replay.py, which makes the table.

// The block's shared memory, as 16 bytes at a time, which are the most that a thread can copy.
struct alignas(16) Piece {
    Index halves[2];
};
extern __shared__ Piece near[];

__device__ static void copy(char *to, const char *from, Index size)
{
    Index pieces = ((Index)to | (Index)from) % 16 ? 0 : size / 16;
    EACH(i, pieces)
        ((Piece *)to)[i] = ((const Piece *)from)[i];
    for (Index i = 16 * pieces + thread_of_block(); i < size; i += block_size())
        to[i] = from[i];
}

// Copy spans of memory, each an address, a place in shared memory and a size in bytes, to there or back.
__device__ static void copy_all(Integers spans, bool back)
{
    for (Index i = 0; i < spans.size; i += 3) {
        char *there = (char *)spans[i], *here = (char *)near + spans[i + 1];
        copy(back ? there : here, back ? here : there, spans[i + 2]);
    }
}

template <class T> __device__ static T next(const Index *&word)
{
    const T *item = (const T *)word;
    word += sizeof(T) / sizeof(Index);
    return *item;
}

// The second bound, that a multiprocessor runs but one such block, gives each thread all the registers that it may have.
extern "C" __global__ void __launch_bounds__(512, 1) replay(Integers table, Integers moved, Integers spans, Index steps)
{
    Index *words = spans.size ? (Index *)near : table.data; // where nothing fits, the table stays, too
    EACH(i, table.size)
        words[i] = table[i] + moved[i] * (Index)near; // a place becomes an address
    copy_all(spans, false);
    __syncthreads();
    for (; steps; steps--)
        for (const Index *word = words; word < words + table.size; __syncthreads())
            switch (*word++) {
CASES
            }
    copy_all(spans, true);
}
