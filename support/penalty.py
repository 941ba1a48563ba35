"""The repetition penalty of CTRL (arXiv 1909.05858), as transformers applies it. For evaluations
only: training does not score with it."""
import torch
from torch import Tensor


class RepetitionPenalty:
    """Divides the logit of every token that prompt or response already hold by the penalty, or
    multiplies it where it is negative. One for each call of `generate`."""
    def __init__(self, penalty: float, prompts: list[list[int]]):
        self.penalty, self.prompts = penalty, prompts

    def __call__(self, logits: Tensor, alive: Tensor, numbers: Tensor, token: Tensor | None
                 ) -> Tensor:
        """Returns the logits [B'·G', V] of the rollouts `numbers` [B', G'] of the prompts `alive`
        [B'] after the penalty. token [B', G']: the last token of each; None before the first."""
        if self.penalty == 1:
            return logits
        if token is None:
            self.seen = logits.new_zeros(*numbers.shape, logits.shape[-1], dtype=torch.bool)
            for line, tokens in zip(self.seen, self.prompts):                   # [G, V]
                line[:, torch.tensor(tokens, device=logits.device)] = True
        else:
            self.seen[alive[:, None], numbers, token] = True
        seen = self.seen[alive[:, None], numbers].flatten(0, 1)
        penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(seen, penalised, logits)
