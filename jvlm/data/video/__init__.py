"""Videos: which frames are sampled, and how they are decoded. Decoding needs the extra ``jvlm[video]``."""
