"""The paper's tables and figures: what to run, how to collect, what came out. See README.md in this folder."""
