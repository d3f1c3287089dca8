"""From training data to samples and a certificate: the pipeline, its plan and its result."""
