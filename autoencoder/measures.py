"""What sae_evaluation.py measures, in words: the rows of its table and of the report."""

from typing import Any, NamedTuple

DENSE = 0.1  # a latent that fires on a greater share of the tokens is dense


class Measure(NamedTuple):
    """A number of NAME.evaluation.json."""

    key: str
    about: str
    form: str

    def show(self, value: Any) -> str:
        """The formatted value; a dash for None, "not measured"."""
        return "-" if value is None else self.form.format(value)


MEASURES = (
    Measure("fvu", "fraction of variance unexplained (FVU)", "{:.4f}"),
    Measure("fvu_raw", "… of activations as they are, not normalised", "{:.4f}"),
    Measure("mse_normalized", "mean squared error, of normalised activations", "{:.4f}"),
    Measure("cosine", "cosine between an activation and its reconstruction", "{:.4f}"),
    Measure("l0", "latents above zero per token (L0)", "{:.2f}"),
    Measure("n_latents", "latents", "{:,}"),
    Measure("silent_frac", "latents that fire on none of these tokens", "{:.2%}"),
    Measure("dead_frac", "latents dead at the end of training", "{:.2%}"),
    Measure("dense_frac", f"latents that fire on more than {DENSE:.0%} of the tokens", "{:.2%}"),
    Measure("loss_clean", "cross-entropy of the model as it is, nats per prediction", "{:.4f}"),
    Measure("loss_spliced", "… with the SAE spliced in", "{:.4f}"),
    Measure("loss_zeroed", "… with the site set to zero", "{:.4f}"),
    Measure("loss_mean", "… with the site set to its mean", "{:.4f}"),
    Measure("zeroing_cost", "cost of zeroing: zeroed - clean", "{:.4f}"),
    Measure("mean_cost", "cost of the mean: mean - clean", "{:.4f}"),
    Measure("loss_recovered", "loss recovered, against zero: (zeroed - spliced) / (zeroed - clean)", "{:.2%}"),
    Measure("loss_recovered_mean", "loss recovered, against the mean: (mean - spliced) / (mean - clean)", "{:.2%}"),
    Measure("kl_spliced", "KL divergence of the spliced model from the clean one, nats per prediction", "{:.4f}"),
    Measure("kl_zeroed", "… of the model with the site set to zero", "{:.4f}"),
    Measure("kl_mean", "… of the model with the site set to its mean", "{:.4f}"),
    Measure("tokens", "activations", "{:,}"),
    Measure("sentences", "held-out sentences", "{:,}"),
)
