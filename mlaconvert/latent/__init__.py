"""The maths of a conversion: tensors in, factors out. Knows no files and no names of checkpoints.

`weights` are a layer's, `moments` what is known of its inputs, `roots` and `metric` weigh them, `components` and
`pairs` choose what stays rotary, `factorize` makes the factors (`random_start` draws them), `spectrum` says what a rank
loses, `allocate` divides scalars between layers. `lapack` and `plain` solve eigenproblems.

    import torch

    from mlaconvert.latent.spectrum import effective_rank, gram, singular_values_from_gram

    effective_rank(singular_values_from_gram(gram(torch.randn(64, 48))), 0.99)
"""
