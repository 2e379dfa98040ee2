"""Phase 3 on all parts of a bucket, the sizes of its updates, and its weights in their own dtype."""

from symlm.step.bucket import Bucket
from symlm.update.apply import apply
from symlm.update.rounding import store
from symlm.update.size import Change, UpdateSize


def update(bucket: Bucket, size: UpdateSize) -> None:
    """Run phase 3 on a bucket; its directions are freed before the next one's are computed.

    Args:
        bucket: The bucket, whose directions have been started.
        size: The sizes of the step's updates, to which its are added.
    """
    for members, block, updates in bucket.updates():
        change = apply(bucket.group, members, block, updates, bucket.finite)
        size.add(bucket.group, change, sum(U.numel() for U in updates))
    if bucket.fused:
        size.add(bucket.group, Change(1.0, squared=bucket.squared), bucket.entries)
    for member in bucket.batch:
        store(bucket.group, member, bucket.finite)
