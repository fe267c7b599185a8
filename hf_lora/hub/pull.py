"""A repository -> an adapter: one look at the Hub, then files pinned to one commit."""

from __future__ import annotations

from hf_lora.adapter import Adapter
from hf_lora.exchange import finder
from hf_lora.fetch import local_files
from hf_lora.formats import read_adapter
from hf_lora.limits import LoadLimits


def pull_lora(
    repo_id: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    host: object | None = None,
    limits: LoadLimits | None = None,
) -> Adapter:
    """Downloads an adapter and checks it whole: layout, values, digest.

    Config and weights come from one commit, and only they are downloaded. Repositories of peft,
    diffusers, kohya's scripts, ComfyUI and their kin are read. Files in the cache are used again,
    and a commit that lies there whole is not asked for.

    Args:
        repo_id: The repository, "user/name".
        file: Which folder or file of it is the adapter, where there are several.
        revision: Branch, tag or commit; `main` when left out.
        token: Access token; the logged-in one when left out.
        host: For files of kohya, LyCORIS, ComfyUI and their kin: the model or pipeline they are
            for, or the name of a public one. Left out, the first one that fits.
        limits: Bounds on what is read.

    Returns:
        The adapter, tensors on the CPU in the file's dtypes.

    Raises:
        AdapterNotFound: The repository is missing, private, gated, out of reach, without that
            revision or without an adapter; or it holds several, which the error lists.
        BadAdapterFile: A file is damaged, unsafe or not understood.
        AdapterMismatch: Config and tensors contradict each other, or the file fits no known host.
    """
    found = local_files(repo_id, file=file, revision=revision, token=token)
    return read_adapter(found, limits=limits, names_of=finder(host))
