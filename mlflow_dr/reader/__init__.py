"""DPR's extractive reader: finds the answer to a question in the passages of a retriever."""
