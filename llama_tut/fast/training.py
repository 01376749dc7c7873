# From notebooks/19_fast_training.ipynb by scripts/export.py: edit the notebook.
"""Faster training: attention in blocks, and the head's loss in tiles.

`speed_up` swaps both into a finished model from outside; `start_from_counts`
fits its embedding and head to the pairs in a text.

Letters: B batch, T time of the queries, S time of the keys, D hidden_size,
H heads, K kv heads, G = H/K heads of a group, C head_dim, V vocabulary;
R rows and M words of one tile; `...` stands for any axes.
"""

import functools
import warnings

import torch
from torch.nn import functional as F

from llama_tut.attention import LlamaAttention, causal_mask
from llama_tut.model import next_token_loss

# Fold: the heads of a group become rows


def attend_block(q, k, v, mask=None):
    """Attention as two matrix products for each group of heads.

    Args:
        q: queries over sqrt(C), [B, H, T, C]: the last T of S tokens.
        k, v: keys and values, [B, K, S, C]; K divides H.
        mask: bool, True = may read, [T, S] or [B, 1, T, S]; None: causal.

    Returns:
        [B, H, T, C]; a row that may read nothing is finite but has no meaning.
    """
    B, H, T, C = q.shape
    K, S = k.shape[1:3]
    G = H // K
    rows = q.reshape(B, K, G * T, C)  # [B, K, G*T, C]
    scores = rows @ k.mT  # [B, K, G*T, S]
    if mask is None and T > 1:
        mask = causal_mask(T, S, q.device)  # [T, S]
    if mask is not None:
        # Far below any score, but not -inf: a row of -inf would give NaN.
        lowest = max(torch.finfo(scores.dtype).min / 2, -1e38)
        bias = scores.new_zeros(mask.shape)  # [..., T, S]
        bias = bias.masked_fill(~mask, lowest).unsqueeze(-3)  # [..., 1, T, S]
        scores = scores.view(B, K, G, T, S) + bias  # [B, K, G, T, S]
        scores = scores.view(B, K, G * T, S)  # [B, K, G*T, S]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)  # [B, K, G*T, S]
    out = weights.to(v.dtype) @ v  # [B, K, G*T, C]
    return out.view(B, H, T, C)  # [B, H, T, C]


# Blocks: do not compute the future


def blocked_attention(q, k, v, attention_mask=None):
    """`attend` of chapter 5 by blocks of queries; keys are never repeated.

    Args, result: as in `attend`. A causal block computes no score beyond its
    own end; with a mask of the caller's, each block gets all keys.
    """
    B, H, T, C = q.shape
    S = k.shape[2]
    q = q * C**-0.5  # [B, H, T, C]
    mask = attention_mask  # [..., T, S]
    if mask is not None:
        mask = mask.broadcast_to(B, 1, T, S)  # [B, 1, T, S]
    # Queries of a block: at most 8 blocks. With a mask they save only memory.
    size = max(32 if mask is None else 256, -(-T // 8))
    if T <= size:
        return attend_block(q, k, v, mask)  # [B, H, T, C]
    blocks = q.split(size, dim=2)
    if mask is not None:
        pairs = zip(blocks, mask.split(size, dim=2), strict=True)
        outs = [attend_block(block, k, v, rows) for block, rows in pairs]
        return torch.cat(outs, dim=2)  # [B, H, T, C]
    # Cut the keys once and join what a block needs: the gradient of a slice
    # k[:, :, :end] would be as long as k, and mostly zeros.
    lengths = [block.shape[2] for block in blocks]
    lengths[0] += S - T  # earlier tokens belong to the first piece
    keys, values = k.split(lengths, dim=2), v.split(lengths, dim=2)
    outs = []
    for i, block in enumerate(blocks, start=1):
        past = torch.cat(keys[:i], dim=2), torch.cat(values[:i], dim=2)
        outs.append(attend_block(block, *past))
    return torch.cat(outs, dim=2)  # [B, H, T, C]


# Tiles: the loss without all logits


def tile_size(vocab_size, device):
    """Rows R and words M of one tile of logits; all tiles are equally wide.

    A tile is 2 MiB in float32 on a CPU, near its cache, and up to 256 MiB on
    a GPU, which needs large products. The third number says how many tiles
    the second pass gets from the first: all, if a CPU's rows fit in 64 MiB.
    """
    on_gpu = device.type == "cuda"
    rows, most = (4096, 16_384) if on_gpu else (512, 1024)
    tiles = -(-vocab_size // most)
    few = not on_gpu and 4 * rows * vocab_size <= 64 * 2**20
    return rows, -(-vocab_size // tiles), tiles if few else 1


class FusedOnGPU:
    """A function of tensors that is compiled the first time a GPU runs it.

    Where the compiler does not work, the function stays as it is.
    """

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function, self.fast = function, None

    def __call__(self, tensor, *args):
        if not tensor.is_cuda:
            return self.function(tensor, *args)  # [...]
        if self.fast is None:
            try:
                self.fast = torch.compile(self.function)
                return self.fast(tensor, *args)  # [...]
            except Exception as error:  # whatever the compiler's tools raise
                warnings.warn(f"not compiled: {error}", stacklevel=2)
                self.fast = self.function
        return self.fast(tensor, *args)  # [...]


@FusedOnGPU
def log_sum_exp(logits):
    """Logits [R, M] -> float32 [R, 1]."""
    return logits.float().logsumexp(-1, keepdim=True)  # [R, 1]


def find_normaliser(h, weight, tiles, keep):
    """First pass: log of the summed exponentials of each row.

    Args:
        h: [R, D]; weight: [V, D], in the same dtype.
        tiles: slices that cut up the vocabulary.
        keep: for how many tiles, the last ones, logits are kept.

    Returns:
        float32 [R, 1], and a list of the kept tiles' logits [R, M].
    """
    normaliser = torch.full_like(h[:, :1], -torch.inf).float()  # [R, 1]
    kept = []
    for words in tiles:
        if len(kept) == keep:  # frees a tile before the next is made
            kept.pop(0)
        kept.append(h @ weight[words].T)  # [R, M]
        part = log_sum_exp(kept[-1])  # [R, 1]
        normaliser = torch.logaddexp(normaliser, part)  # [R, 1]
    return normaliser, kept  # [R, 1], [R, M]


@FusedOnGPU
def to_gradient(logits, normaliser, column):
    """Turn a tile of logits into its gradient, softmax - [target].

    Float32 logits are overwritten on a CPU.

    Args:
        logits: [R, M]; normaliser: [R, 1].
        column: where in the tile the target would stand, [R, 1].
    """
    if logits.is_cuda:  # a comparison joins the kernel, a scatter does not
        columns = torch.arange(logits.shape[1], device=logits.device)  # [M]
        grad = (logits.float() - normaliser).exp()  # [R, M]
        return (grad - (columns == column).float()).to(logits.dtype)  # [R, M]
    grad = logits.float().sub_(normaliser).exp_()  # [R, M]
    is_here = (column >= 0) & (column < grad.shape[1])  # [R, 1]
    column = column.clamp(0, grad.shape[1] - 1)  # [R, 1]
    grad.scatter_add_(1, column, -is_here.float())
    return grad.to(logits.dtype)  # [R, M]


def cast_and_join(parts, dtype):
    """One table [V, D] in `dtype` from a list of its parts [M, D].

    Each part is freed as soon as it is cast.
    """
    for k, part in enumerate(parts):
        parts[k] = part.to(dtype)  # [M, D]
    return torch.cat(parts)  # [V, D]


def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross entropy of `hidden @ weight.T` and its two gradients.

    Args:
        hidden: [B*T, D]; weight: [V, D]; targets: [B*T], -100: not counted.
        dtype: of the matrix products.
        wanted: whether to make gradients; if not, they come back empty.
    """
    w = weight.to(dtype)  # [V, D]
    V, D = w.shape
    R, M, keep = tile_size(V, w.device)
    tiles = [slice(i, min(i + M, V)) for i in range(0, V, M)]
    counts = (targets != -100)[:, None]  # [B*T, 1]
    share = counts / counts.sum()  # [B*T, 1]
    loss = torch.zeros((), device=weight.device)  # []
    grad_h = torch.zeros(wanted * len(hidden), D, device=w.device)  # [..., D]
    if small := weight.dtype.itemsize < 4:  # a sum of its own for each tile
        sums = weight[: wanted * V].split(M)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in sums]
    else:
        grad_w = torch.zeros(wanted * V, D, device=w.device)  # [..., D]
        sums = list(grad_w.split(M))
    for i in range(0, len(hidden), R):
        rows = slice(i, i + R)
        h, y = hidden[rows].to(dtype), targets[rows, None]  # [R, D], [R, 1]
        normaliser, kept = find_normaliser(h, w, tiles, keep)  # [R, 1]
        right = w[y[:, 0].clamp(min=0)].float()  # [R, D]
        target_logit = (h.float() * right).sum(-1, keepdim=True)  # [R, 1]
        loss = loss + ((normaliser - target_logit) * share[rows]).sum()  # []
        h_share = (h * share[rows]).to(dtype)  # [R, D]
        for k, words in reversed([*enumerate(tiles)]) if wanted else ():
            logits = kept.pop() if kept else h @ w[words].T  # [R, M]
            g = to_gradient(logits, normaliser, y - words.start)  # [R, M]
            grad_h[rows] += (g @ w[words]) * share[rows]
            sums[k] += g.T @ h_share  # [M, D]
            del g, logits  # before the next tile is made
    if small:
        grad_w = cast_and_join(sums, weight.dtype)  # [..., D]
    return loss, grad_h.to(hidden.dtype), grad_w  # [], [..., D], [..., D]


as_one_operation = torch.library.custom_op(
    "llama_tut::loss_and_gradients", loss_and_gradients, mutates_args=()
)


@as_one_operation.register_fake
def shapes_of_results(hidden, weight, targets, dtype, wanted):
    """What the compiler must know: shapes and dtypes of the results."""
    loss = torch.empty((), device=weight.device)  # []
    return loss, hidden[: wanted * len(hidden)], weight[: wanted * len(weight)]


class HeadLoss(torch.autograd.Function):
    """The loss by tiles: the forward pass makes the gradients, too."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, wanted):
        """hidden [B*T, D], weight [V, D], targets [B*T] -> float32 []."""
        compute = loss_and_gradients
        if torch.compiler.is_compiling():
            compute = as_one_operation
        found = compute(hidden, weight, targets, dtype, wanted)
        if wanted:
            ctx.save_for_backward(*found[1:])
        return found[0]  # []

    @staticmethod
    def backward(ctx, gradient):
        """gradient [] -> those of hidden [B*T, D] and weight [V, D]."""
        grad_h, grad_w = ctx.saved_tensors  # [B*T, D], [V, D]
        # In place: no second copy of [V, D]. Backward works once.
        grad_h.mul_(gradient)
        grad_w.mul_(gradient)
        return grad_h, grad_w, None, None, None  # [B*T, D], [V, D]


def head_loss(hidden, weight, targets):
    """`next_token_loss` of chapter 8 without ever holding all logits -> [].

    Args:
        hidden: normalised stream, [B, T, D] (or any [..., D]).
        weight: the head, [V, D]; may be the tied embedding.
        targets: true next tokens, [B, T]; -100 does not count.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return HeadLoss.apply(
        hidden.flatten(0, -2),
        weight,
        targets.flatten(),
        dtype,
        torch.is_grad_enabled(),
    )  # []


# One call

# Above it the logits of a batch take gigabytes on a CPU.
LARGE_VOCABULARY = 65_536


def tiles_if_eager(hidden, weight, targets):
    """`head_loss`, but `next_token_loss` in code that is compiled -> []."""
    compiled = torch.compiler.is_compiling()
    loss = next_token_loss if compiled else head_loss
    return loss(hidden, weight, targets)  # []


def speed_up(model, device=None, dtype=None):
    """Swap in, from outside, what was measured to pay; same results.

    - CPU and CUDA: loss in tiles where it is not compiled.
    - CPU: in bfloat16 attention in blocks; with a vocabulary above
      LARGE_VOCABULARY loss in tiles in any case, which saves gigabytes.

    Args:
        model: a `LlamaForCausalLM`, changed in place.
        device, dtype: where and in what the products will run, autocast's
            dtype where it is used. Default: those of the weights.

    Returns:
        The same model.
    """
    device = torch.device(device or model.output_weight.device)
    dtype = dtype or model.output_weight.dtype
    on_cpu = device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, LlamaAttention):
                module.attend = blocked_attention
    if device.type in ("cpu", "cuda"):
        model.compute_loss = tiles_if_eager
    if on_cpu and len(model.output_weight) > LARGE_VOCABULARY:
        model.compute_loss = head_loss
    return model


# Start where counting ends


def start_from_counts(model, tokens, dtype=torch.float32, scale=0.15):
    """Fit embedding and head to the pairs in a text, in place.

    Without its blocks, which stay as they are, the model then gives the
    probability of a token given the one before it.

    Args:
        model: a `LlamaForCausalLM` with a head of its own.
        tokens: the text, int64 [N].
        dtype: of the matrix products.
        scale: root mean square of each row of the embedding afterwards.
    """
    E = model.model.embed_tokens.weight  # [V, D]
    U = model.output_weight  # [V, D]
    V, D = E.shape
    pairs = tokens[:-1] * V + tokens[1:]  # [N-1]
    counts = torch.bincount(pairs, minlength=V * V).view(V, V)  # [V, V]
    joint = counts / counts.sum()  # [V, V], how often row, then column
    with torch.no_grad():
        E.copy_(F.rms_norm(E, (D,)))
    optimizer, steps = torch.optim.Adam([E, U], betas=(0.9, 0.95)), 60
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logits = F.rms_norm(E, (D,)).to(dtype) @ U.to(dtype).T  # [V, V]
        F.cross_entropy(logits.float(), joint, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        E.copy_(scale * F.rms_norm(E, (D,)))
