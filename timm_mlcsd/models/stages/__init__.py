"""How a timm model becomes a row of stages: read off a probe batch, placed exits, run one by one or whole."""
