"""What Claude costs."""

# USD per million input and output tokens, from platform.claude.com/docs/en/about-claude/pricing, November 2026.
# claude-haiku-5-5 costs five times as much for prompts of more than 100,000 tokens, which are not counted here.
PRICES = {
    "claude-haiku-5-5": (0.10, 0.50),
    "claude-sonnet-5-5": (2.00, 10.00),
    "claude-opus-5-5": (4.00, 20.00),
    "claude-fable-5-1": (10.00, 50.00),
    "claude-sonnet-5": (2.00, 10.00),
    "claude-opus-5": (5.00, 25.00),
    "claude-haiku-4-5": (1.00, 5.00),
}
FULL_PRICE = 1.0
BATCH_PRICE = 0.5  # a request in a batch costs half


def cost(model: str, n_input: float, n_output: float, price_ratio: float) -> float | None:
    """USD for a model's tokens; None if PRICES lacks the model. A dated name has the price of the plain one."""
    names = [name for name in PRICES if model == name or model.startswith(name + "-20")]
    if not names:
        return None
    input_price, output_price = PRICES[names[0]]
    return price_ratio * (n_input * input_price + n_output * output_price) / 1e6
