"""Plain ``nn.Module`` models of the ViT-MLP-LLM family; they know nothing of parallelism.

``vit`` → ``projector`` → ``decoder`` are composed in ``internvl``; ``table`` lists the published sizes and ``hf``
reads and writes Hugging Face checkpoints.
"""
