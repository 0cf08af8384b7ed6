"""Reading what is not trusted, writing what appears whole or not at all. Knows files and tensors, no models.

`find` opens a path or Hub id as a `store` of tensors (`headers`, `pickles`, `select`, `hub_cache`), `contents` tells
what a file is that is named otherwise, `inputs` reads small files; `writer` lays out a model's files, `staging` puts
them in place in one step, `scratch` holds what memory does not.

    from mlaconvert.files.find import open_store

    with open_store("model.safetensors") as store:
        first = store.read(next(iter(store.tensors)))
"""
