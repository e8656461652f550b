"""The paper's tables and figures: run plans, measurements and reports. See README.md in this folder."""
