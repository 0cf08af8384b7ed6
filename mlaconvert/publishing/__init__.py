"""A converted model on the Hub.

`folder` is what may be sent, `plan` what becomes of every file there, `api` the Hub's client, `hub` does it.

    from mlaconvert.publishing.hub import push

    report = push("wan-mla", "alice/wan-mla", dry_run=True)
"""
