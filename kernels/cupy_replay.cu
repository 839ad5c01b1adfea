// A training step as one kernel of a block or a few; see cupy_math.cu, and OneKernel in cupy_replay.py, which makes the
// table.

// Blocks of a cluster work at the same time, each on a multiprocessor of its own. What one has written before it waits,
// the others see.
#if BLOCKS > 1
#define TOGETHER __cluster_dims__(1, BLOCKS, 1)
__device__ static void wait_for_all()
{
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}
#else
#define TOGETHER
__device__ static void wait_for_all() { __syncthreads(); }
#endif

// The block's shared memory, as 16 bytes at a time, which are the most that a thread can copy.
struct alignas(16) Piece {
    Word halves[2];
};
extern __shared__ Piece near[];

__device__ static void copy(char *to, const char *from, Word size)
{
    Word pieces = ((Word)to | (Word)from) % 16 ? 0 : size / 16;
    EACH_OF_BLOCK(i, pieces)
        ((Piece *)to)[i] = ((const Piece *)from)[i];
    for (Word i = 16 * pieces + thread_of_block(); i < size; i += block_size())
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

template <class T> __device__ static T next(const Word *&word)
{
    const T *item = (const T *)word;
    word += sizeof(T) / sizeof(Word);
    return *item;
}

// The second bound, that a multiprocessor runs but one such block, gives each thread all the registers that it may have.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, 1)
    replay(Integers table, Integers moved, Integers spans, Word table_is_near, Word steps)
{
    Word *words = table_is_near ? (Word *)near : table.data;
    EACH_OF_BLOCK(i, table.size)
        words[i] = table[i] + moved[i] * (Word)near; // a place becomes an address
    copy_all(spans, false);
    __syncthreads();
    for (; steps; steps--)
        for (const Word *word = words; word < words + table.size;) {
            if (*word++)
                wait_for_all();
            switch (*word++) {
CASES
            }
        }
    __syncthreads();
    copy_all(spans, true);
}
