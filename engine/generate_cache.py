"""The key-value cache of batched decoding: a prompt's keys and values lie there once, however many answers share them.

    prompts   [G slots, K, P, D]   ◄── prefill: prompts packed as in training [T], attention inside each
    answers   [B rows,  K, O, D]   ◄── a step: one token per answer [B]

    a step's scores   q · (its prompt's keys | its own keys)   [G, K, n·R, P + O]   n: most answers of one prompt
                      one softmax over both; queries of one prompt meet its keys together, so that these are read once

Legend: A query heads, K KV heads, R = A / K, D head dim, P longest prompt, O most answer tokens so far.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from evovlm.csrc.ops import packed_attention
from evovlm.models.config import DecoderConfig


class KVSlots:
    """Keys and values of up to N token sequences of any length up to P, which grows as needed.

    Args:
        config: The decoder's shape.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.queries = config.num_heads // config.num_kv_heads  # R
        empty = (2, 0, config.num_kv_heads, 0, config.head_dim)
        self.layers = [torch.zeros(empty, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def reserve(self, num: int, length: int) -> None:
        """Make room for ``num`` sequences of ``length`` tokens; what fits the new room is kept.

        More sequences than asked for get room where only their number grows, so that steady growth costs little. A
        greater length gives room for no more than ``num``: memory stays near what is in use.
        """
        _, have, heads, room, dim = self.layers[0].shape
        if num <= have and length <= room:
            return
        shape = (2, num, heads, length, dim) if length > room else (2, max(num, have * 3 // 2), heads, length, dim)
        kept, used = min(have, shape[1]), min(room, length)
        for layer, old in enumerate(self.layers):  # layer by layer: never twice the cache at a time
            new = old.new_zeros(shape)
            new[:, :kept, :, :used] = old[:, :kept, :, :used]
            self.layers[layer] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of sequence ``source`` over those of ``target``."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]


class PromptAttend:
    """Attention of whole prompts, which fills their slots; an ``Attend`` for the decoder.

    Args:
        prompts: Where keys and values go; has room for them.
        lengths: Tokens of each prompt in the pack.
        first_slot: Slot of the first one; the others follow.
    """

    def __init__(self, prompts: KVSlots, lengths: Sequence[int], first_slot: int) -> None:
        self.prompts, self.lengths, self.first_slot = prompts, list(lengths), first_slot
        self.borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values ``[T, K, D]``, then attend inside each prompt."""
        slots = self.prompts.layers[layer]
        for number, (begin, end) in enumerate(pairwise(self.borders.tolist())):
            for part, new in enumerate((k, v)):
                slots[part, self.first_slot + number, :, : end - begin] = new[begin:end].transpose(0, 1)
        return packed_attention(q, k, v, self.borders)


class StepAttend:
    """Attention of one token per answer over its prompt and its own tokens; an ``Attend`` for the decoder.

    Args:
        prompts: Keys and values of G prompts.
        answers: Keys and values of B answers, row by row; has room for one more token of each.
        slots: Prompt of each row.
        seen: How many tokens of that prompt each row sees, at least 1.
        lengths: Tokens of each row in ``answers``; the step's token is written behind them.
    """

    def __init__(
        self,
        prompts: KVSlots,
        answers: KVSlots,
        slots: Sequence[int],
        seen: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.prompts, self.answers = prompts, answers
        device, dtype = answers.layers[0].device, answers.layers[0].dtype
        self.lengths = torch.tensor(lengths, device=device)
        self.batch = torch.arange(len(slots), device=device)
        self.num_seen, self.num_own, self.num_prompts = max(seen), max(lengths) + 1, max(slots) + 1

        columns = torch.arange(max(self.num_seen, self.num_own), device=device)
        in_prompt = columns[: self.num_seen] < torch.tensor(seen, device=device)[:, None]
        own = columns[: self.num_own] <= self.lengths[:, None]
        visible = torch.cat([in_prompt, own], dim=1)[:, None, None]
        self.mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
        self.meeting: _Meeting | None = None
        if list(slots) != list(range(len(slots))):
            self.meeting = _Meeting(slots, device)
            # [G, 1, n·R, P + O]; else [B, 1, 1, P + O]
            self.mask = self.meeting.gather(self.mask.expand(-1, -1, answers.queries, -1))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values ``[B, K, D]`` of the new tokens, then attend with queries ``[B, A, D]``."""
        answers, prompts = self.answers.layers[layer], self.prompts.layers[layer]
        answers[0, self.batch, :, self.lengths] = k
        answers[1, self.batch, :, self.lengths] = v
        B, K, D = k.shape
        keys, values = answers[:, :B, :, : self.num_own]
        prompt_keys, prompt_values = prompts[:, : self.num_prompts, :, : self.num_seen]

        meeting, P = self.meeting, self.num_seen
        q = (q * D**-0.5).view(B, K, -1, D)
        own, at_prompt = q @ keys.transpose(-1, -2), q
        if meeting is not None:
            own, at_prompt = meeting.gather(own), meeting.gather(q)
        scores = torch.cat([at_prompt @ prompt_keys.transpose(-1, -2), own], dim=-1) + self.mask
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        from_prompt, own = weights[..., :P] @ prompt_values, weights[..., P:]
        if meeting is not None:
            from_prompt, own = meeting.scatter(from_prompt), meeting.scatter(own)
        out: Tensor = own @ values + from_prompt
        return out.flatten(1, 2)


class _Meeting:
    """Brings the queries of each prompt together: rows of B answers to places of G prompts, and back.

    A prompt with fewer answers than others repeats row 0 in the places that are left; nobody reads what comes out.
    """

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(max(slots) + 1)]
        places = []  # of each row: which query of its prompt it is
        for row, slot in enumerate(slots):
            places.append(len(members[slot]))
            members[slot].append(row)
        self.most = max(map(len, members))
        self.rows = torch.tensor([rows + [0] * (self.most - len(rows)) for rows in members], device=device)  # [G, n]
        self.slots, self.places = torch.tensor([slots, places], device=device)

    def gather(self, x: Tensor) -> Tensor:
        """Turn ``[B, K, R, X]`` into ``[G, K, n·R, X]``."""
        return x[self.rows].transpose(1, 2).flatten(2, 3)

    def scatter(self, x: Tensor) -> Tensor:
        """Turn ``[G, K, n·R, X]`` back into ``[B, K, R, X]``."""
        G, K, queries, X = x.shape
        return x.view(G, K, self.most, queries // self.most, X).transpose(1, 2)[self.slots, self.places]
