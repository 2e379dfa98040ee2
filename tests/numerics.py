"""Every tolerance of the suite, with the reason for its size."""

EXACT = 1e-12  # float64: rounding of a few hundred additions, relative
ROTATED = 1e-8  # float64 through a Gram matrix at condition 1e6, which the kept part of the old rotation bounds
MUST_FAIL = 0.05  # relative change that a broken symmetry shows at least
BRAKE = 1e-6  # the same of AuON, whose scalar alone breaks it, by about 1/6N of N entries squared
RUN = 1e-8  # float64 after five training steps of a network
FP32 = 2e-6  # fp32 rounding of one update, relative
BF16_POLAR = 0.03  # two bf16 Newton–Schulz iterations that round in different places, relative
EXACT_POLAR_FP32 = 1e-4  # fp32 direct methods at condition 100
KERNEL = 2.0  # a kernel's error against float64, in units of torch's own matmul error in that dtype
KERNEL_FLOOR = {"float32": 2e-7, "float16": 5e-4}  # rounding of the inputs and of the result alone
RANKS = 1e-4  # fp32 after ten steps on other partial sums of the gradients, which small singular values amplify
RANKS_AT_SMALL_RATES = 2e-6  # the same at lr = 1e-3, where torch's AdamW moves by 1.8e-6 for other partial sums
RANKS_OF_ROOTS = 2e-5  # that through the inverse root of a Gram matrix of few steps, which is nearly singular
LOSS_STAYS = 1e-9  # a loss in float64 under a symmetry of its parameters, relative to its size or to 1
LOSS_CHANGES = 1e-7  # the same move without one of its members, at least
TURNS = 1e-9  # singular values of gradients' skew parts that add to zero, relative to the largest
STILL = 1e-11  # a skew part that is zero by itself, relative to weight and gradient
MEMBER = 1e-6  # the share of an axis in what adds to zero, at least


def relative(a, b):
    """Return |a − b| / |b|, with |b| taken as 1 where b is zero."""
    size = b.norm().item()
    return (a - b).norm().item() / (size or 1.0)
