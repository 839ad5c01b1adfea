// Products on the host behind the functions of cuBLASLt and cuBLAS that cublaslt.py calls, by their documentation:
// matrices lie column by column, and d = op(a) op(b) + bias of each row.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

struct Layout {
    int type;
    int64_t rows, columns, step;
};
struct Product {
    int compute, type;
    std::map<int, int64_t> attributes;
};
struct Result {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
enum { POINTER_MODE = 2, TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8, BIAS = 4 };
enum { R_32F = 0, R_64F = 1, R_16BF = 14, COMPUTE_64F = 70 };
enum { INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

struct Bfloat16 {
    uint16_t bits;
    operator float() const
    {
        uint32_t whole = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &whole, 4);
        return x;
    }
    void operator=(float x) // the nearest, of two the one with an even last bit
    {
        uint32_t whole;
        memcpy(&whole, &x, 4);
        uint32_t below = whole & 0xffff, last = whole >> 16 & 1;
        bits = (whole >> 16) + (x == x && (below > 0x8000 || (below == 0x8000 && last)));
    }
};

// Sums in double precision, or else, `otherwise`, as they come and from the other end, which rounds differently. A bias is
// added to what was rounded, as a kernel of its own would.
template <class Real, class Factor, class Result>
static void multiply(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, const void *given_alpha,
                     const void *given_a, int64_t lda, const void *given_b, int64_t ldb, const void *given_beta,
                     void *given_c, int64_t ldc, const void *given_bias, bool otherwise)
{
    Real alpha = *(const Real *)given_alpha, beta = *(const Real *)given_beta;
    const Factor *a = (const Factor *)given_a, *b = (const Factor *)given_b;
    const Result *bias = (const Result *)given_bias;
    Result *c = (Result *)given_c;
    std::vector<double> column(m);
    for (int64_t j = 0; j < n; j++) {
        std::fill(column.begin(), column.end(), 0.0);
        for (int64_t step = 0; step < k; step++) {
            int64_t l = otherwise ? k - 1 - step : step;
            double factor = transpose_b ? b[j + l * ldb] : b[l + j * ldb];
            for (int64_t i = 0; i < m; i++) {
                column[i] += factor * (transpose_a ? a[l + i * lda] : a[i + l * lda]);
                column[i] = otherwise ? Real(column[i]) : column[i];
            }
        }
        for (int64_t i = 0; i < m; i++) {
            Real x = alpha * column[i] + (beta == 0 ? 0 : beta * Real(c[i + j * ldc]));
            x += bias ? Real(bias[i]) : 0;
            c[i + j * ldc] = x;
        }
    }
}

static auto multiply_of(int factors, int result) -> decltype(&multiply<float, float, float>)
{
    if (factors == R_32F && result == R_32F)
        return multiply<float, float, float>;
    if (factors == R_64F && result == R_64F)
        return multiply<double, double, double>;
    if (factors == R_16BF)
        return result == R_32F ? multiply<float, Bfloat16, float>
               : result == R_16BF ? multiply<float, Bfloat16, Bfloat16> : nullptr;
    return nullptr;
}

static bool is_zero(const void *x, int type) { return type == R_64F ? *(double *)x == 0 : *(float *)x == 0; }

extern "C" {
// what this library can do, and what it says where it cannot, for tests of what happens then
int fused_epilogues = 1, any_algorithm = 1, refusal = NOT_SUPPORTED;
int algorithms = 3; // how many it knows with an epilogue, and without; the third rounds otherwise
int in_workspace = 0; // how many of them, from the first on, need much memory to work in
int named = 3; // how many it names where a factor counts as transposed
int unfit = -1; // one of those that it names elsewhere, which is not for such a factor

static bool counts_as_transposed(Product *product) { return product->attributes[TRANSA] || product->attributes[TRANSB]; }

int cublasLtCreate(void **handle) { return *handle = (void *)1, 0; }
int cublasCreate_v2(void **handle) { return *handle = (void *)2, 0; }
static int math_mode = 0;
int cublasSetMathMode(void *, int mode) { return math_mode = mode, 0; }
int cublasSetPointerMode_v2(void *, int) { return 0; }
int cublasSetStream_v2(void *, void *) { return 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
int cublasLtMatmulDescCreate(Product **made, int compute, int type) { return *made = new Product{compute, type, {}}, 0; }
int cublasLtMatmulDescDestroy(Product *product) { return delete product, 0; }
int cublasLtMatmulDescSetAttribute(Product *product, int attribute, const void *value, size_t size)
{
    if (size != (attribute == BIAS_POINTER ? 8 : 4))
        return INVALID_VALUE;
    int64_t number = 0;
    memcpy(&number, value, size);
    product->attributes[attribute] = number;
    return 0;
}
int cublasLtMatrixLayoutCreate(Layout **made, int type, uint64_t rows, uint64_t columns, int64_t step)
{
    if (step < (int64_t)rows)
        return INVALID_VALUE;
    return *made = new Layout{type, (int64_t)rows, (int64_t)columns, step}, 0;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return delete layout, 0; }
int cublasLtMatmulPreferenceCreate(int **schemes) { return *schemes = new int(7), 0; }
int cublasLtMatmulPreferenceDestroy(int *schemes) { return delete schemes, 0; }
int cublasLtMatmulPreferenceSetAttribute(int *schemes, int attribute, const void *value, size_t size)
{
    if (attribute == 3)
        *schemes = *(const int *)value;
    return size == (attribute == 1 ? 8 : 4) ? 0 : INVALID_VALUE;
}
int cublasLtMatmulAlgoGetHeuristic(void *, Product *product, Layout *, Layout *, Layout *, Layout *of_d, int *schemes,
                                   int wanted, Result *results, int *count)
{
    if (of_d->type == R_16BF && *schemes & ~2) // parts of sums would be rounded to it
        return INVALID_VALUE;
    bool fused = product->attributes[EPILOGUE] != 1;
    int known = std::min(algorithms, counts_as_transposed(product) ? named : algorithms);
    *count = any_algorithm && (fused_epilogues || !fused) ? std::min(wanted, known) : 0;
    memset(results, 0, wanted * sizeof(Result));
    for (int rank = 0; rank < *count; rank++) {
        results[rank].algorithm[0] = rank + (fused ? 0 : 10);
        results[rank].workspace = rank < in_workspace ? 1 << 20 : 1 << 10;
    }
    return *count ? 0 : refusal;
}
int cublasLtMatmulAlgoCheck(void *, Product *product, Layout *, Layout *, Layout *, Layout *, const Result *how, Result *)
{
    return how->algorithm[0] == unfit && counts_as_transposed(product) ? NOT_SUPPORTED : 0;
}
int cublasLtMatmul(void *, Product *product, const void *alpha, const void *a, Layout *of_a, const void *b, Layout *of_b,
                   const void *beta, const void *c, Layout *of_c, void *d, Layout *of_d, const Result *how,
                   void *workspace, size_t, void *)
{
    std::map<int, int64_t> &given = product->attributes;
    int ta = given[TRANSA], tb = given[TRANSB];
    int64_t k = ta ? of_a->rows : of_a->columns;
    if (c != d || !workspace || product->type != (of_d->type == R_64F ? R_64F : R_32F) ||
        (ta ? of_a->columns : of_a->rows) != of_d->rows || (tb ? of_b->rows : of_b->columns) != of_d->columns ||
        (tb ? of_b->columns : of_b->rows) != k)
        return INVALID_VALUE;
    if (!given[POINTER_MODE] && !is_zero(beta, of_d->type))
        return INVALID_VALUE;
    bool otherwise = how->algorithm[0] % 10 == 2;
    void *bias = given[EPILOGUE] & BIAS ? (void *)given[BIAS_POINTER] : nullptr;
    int compute = of_d->type == R_64F ? COMPUTE_64F : product->compute;
    if (product->compute != compute || of_a->type != of_b->type)
        return INVALID_VALUE;
    auto run = multiply_of(of_a->type, of_d->type);
    if (!run)
        return INVALID_VALUE;
    run(ta, tb, of_d->rows, of_d->columns, k, alpha, a, of_a->step, b, of_b->step, beta, d, of_d->step, bias, otherwise);
    return 0;
}
int cublasGemmEx(void *, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type, int lda,
                 const void *b, int, int ldb, const void *beta, void *c, int type_of_c, int ldc, int, int)
{
    auto run = multiply_of(type, type_of_c);
    if (!run || math_mode != 16)
        return INVALID_VALUE;
    run(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, nullptr, false);
    return 0;
}
}
