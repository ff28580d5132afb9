/* kvcast for C, and for every language that can call it: chunks of KV cache are encoded and decoded, stored,
 * and brought back before a deadline.
 *
 * Calls return KVCAST_OK or a code whose meaning never changes; kvcast_message() has the sentence. The
 * library neither prints nor exits, and no exception leaves a call. A session that runs out of memory ends
 * with KVCAST_OUT_OF_MEMORY; that there is not even enough to say so ends the process. Callbacks do not
 * throw. A forked child opens its own. Strings are UTF-8 and end with a zero. Pointers that a call is given
 * are read during that call only, if nothing else is said. Structures that may grow begin with struct_bytes:
 * their own size, so that a program and a library of different ages find out. What a caller leaves zero is
 * the default.
 */
#ifndef KVCAST_H
#define KVCAST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVCAST_API __attribute__((visibility("default")))

/* ---- errors ---- */

enum kvcast_code {
    KVCAST_OK = 0,
    KVCAST_OUT_OF_MEMORY = 1,
    KVCAST_PENDING = 2, /* a session has not ended yet */
    KVCAST_SYSTEM = 3,  /* no thread, or no file descriptor, to be had */
    /* The bytes are not a chunk object that this library reads. */
    KVCAST_TRUNCATED = 10,
    KVCAST_BAD_MAGIC = 11,
    KVCAST_UNSUPPORTED_VERSION = 12,
    KVCAST_UNSUPPORTED_PROFILE = 13,
    /* The header is damaged or contradicts itself. */
    KVCAST_HEADER_CHECKSUM = 20,
    KVCAST_BAD_HEADER = 21,
    KVCAST_LIMIT_EXCEEDED = 22,
    /* A block is damaged. */
    KVCAST_BLOCK_CHECKSUM = 30,
    KVCAST_CORRUPT_BLOCK = 31,
    /* The calibration that a chunk names is not at hand. */
    KVCAST_MISSING_CALIBRATION = 40,
    KVCAST_WRONG_CALIBRATION = 41,
    /* Chunks that do not follow each other. */
    KVCAST_NOT_CONSECUTIVE = 50,
    KVCAST_BROKEN_CHAIN = 51,
    /* The caller's arguments. */
    KVCAST_BAD_ARGUMENT = 60,
    KVCAST_BUFFER_TOO_SMALL = 61,
    /* Storing and fetching. */
    KVCAST_NETWORK = 100,
    KVCAST_TLS = 101,
    KVCAST_HTTP_STATUS = 102,
    KVCAST_PROTOCOL = 103,
    KVCAST_TIMEOUT = 104,
    KVCAST_OBJECT_MISMATCH = 105,
    KVCAST_BAD_MANIFEST = 110,
    KVCAST_UNSIGNED = 111,
    KVCAST_BAD_SIGNATURE = 112,
    KVCAST_EXPIRED = 113,
    KVCAST_FOREIGN = 114,    /* of another model, layout, or other tokens */
    KVCAST_NOT_STORED = 115, /* no part of the context is in the store */
    KVCAST_CANCELLED = 120,
    KVCAST_THROWN = 121, /* a fault of the library: an exception that nobody expected */
    KVCAST_NO_DEVICE = 130,
    KVCAST_DEVICE = 131
};

KVCAST_API const char* kvcast_version(void);
/* For example "block-checksum"; "unknown" where there is no such code. */
KVCAST_API const char* kvcast_code_name(int code);
/* Why this thread's last call failed. Valid until its next call. */
KVCAST_API const char* kvcast_message(void);

/* ---- what a KV cache looks like ---- */

enum kvcast_dtype { KVCAST_BF16 = 0, KVCAST_FP16 = 1, KVCAST_FP32 = 2 };

/* How channels of a K head are paired: i with i + rope_dim / 2 (half), or 2 i with 2 i + 1 (interleaved). */
enum kvcast_pairing { KVCAST_NO_ROPE = 0, KVCAST_HALF = 1, KVCAST_INTERLEAVED = 2 };

typedef struct kvcast_layout {
    uint32_t layers;
    uint32_t planes; /* of a layer. 2: K, as it is after RoPE, and V; 1: one latent plane */
    uint32_t heads[2];
    uint32_t head_dim[2];
    uint32_t dtype;
    uint32_t rope_pairing; /* of plane 0 */
    uint32_t rope_offset;  /* the first channel of a head that is rotated */
    uint32_t rope_dim;     /* and how many are */
    /* The layout is a part of every chunk's identity, to the last bit of a frequency: spell it in one way. */
    double rope_theta; /* frequencies are rope_theta ^ (-2 i / rope_dim) radians a token; or 0, and */
    const double* rope_frequencies; /* rope_dim / 2 frequencies, in radians a token */
} kvcast_layout;

/* A plane of one layer: rows of heads x head_dim elements, one a token, each row_bytes after the one before.
 * Any alignment. Where several are asked for they are [layer][plane]. */
typedef struct kvcast_rows {
    const void* rows;
    size_t row_bytes;
} kvcast_rows;
typedef struct kvcast_buffer {
    void* rows;
    size_t row_bytes;
} kvcast_buffer;

/* ---- the codec ---- */

/* Used by one thread at a time. */
typedef struct kvcast_codec kvcast_codec;

/* Works on `threads` threads, the caller's counted in; 0: as many as there are processors. `calibration` is
 * the content of a .kvcal file, for the profile klt, or NULL. */
KVCAST_API int kvcast_codec_open(size_t threads, const void* calibration, size_t calibration_bytes,
                                 kvcast_codec** codec);
KVCAST_API void kvcast_codec_close(kvcast_codec* codec); /* or NULL */

typedef struct kvcast_chunk {
    size_t struct_bytes;
    const kvcast_layout* layout;
    const char* model;        /* whose KV it is */
    const char* salt;         /* keeps identities apart from other tenants'; or NULL */
    const int32_t* token_ids; /* 1 to 65535 tokens */
    size_t tokens;
    uint64_t first_token;   /* within its context */
    uint64_t base_position; /* of the context's first token */
    uint8_t parent[32];     /* the chain of the chunk before it; zeros: there is none */
    const kvcast_rows* planes;
} kvcast_chunk;

/* Level 0 is lossless; from 1 on levels are lossy, from finest to coarsest, with the codec's calibration, or
 * else of the profile delta, 1 to 7. `object` is the codec's until it encodes again or is closed. `chain` is
 * the chunk's identity. */
KVCAST_API int kvcast_encode(kvcast_codec* codec, const kvcast_chunk* chunk, uint32_t level,
                             const void** object, size_t* object_bytes, uint8_t chain[32]);

typedef struct kvcast_chunk_info {
    size_t struct_bytes;
    uint64_t object_bytes; /* of the whole object */
    uint64_t first_token;
    uint64_t base_position;
    uint32_t tokens;
    uint32_t level;
    kvcast_layout layout; /* without rope_frequencies, and rope_theta 0 where it is not known */
    uint8_t chain[32];
    uint8_t parent[32];
    uint8_t calibration[32]; /* that it needs; zeros: none */
    char model[256];
} kvcast_chunk_info;

/* What an object says of itself. Only its front is needed; blocks are not looked at. */
KVCAST_API int kvcast_inspect(const void* object, size_t bytes, kvcast_chunk_info* info);

/* All layers of a chunk, in the layout of its own that kvcast_inspect() tells, into layers x planes buffers
 * of `tokens` rows each: KVCAST_BUFFER_TOO_SMALL where the chunk has more. After an error their content means
 * nothing. */
KVCAST_API int kvcast_decode(kvcast_codec* codec, const void* object, size_t bytes, size_t tokens,
                             const kvcast_buffer* buffers, size_t buffer_count);

/* ---- storing and fetching ----
 *
 * Stores are at http://, https:// or s3:// URLs. The latter's server and keys are read, at each call, from
 * AWS_ENDPOINT_URL_S3 or else AWS_ENDPOINT_URL, AWS_REGION or else AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID,
 * AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN. */

/* Connections, and codecs for sessions. Any number of threads. */
typedef struct kvcast_client kvcast_client;

typedef struct kvcast_client_options {
    size_t struct_bytes;
    size_t threads;           /* that decode, of each session; 0: as many as there are processors */
    const char* cache_folder; /* keeps calibrations, and what is known of links; or NULL: the last
                                 calibrations only, in memory */
    const char* ca_file;      /* certificates to trust (PEM); or NULL: the system's */
    const char* device;       /* where sessions decode: "cpu", NULL for that, or "cuda" */
} kvcast_client_options;

KVCAST_API int kvcast_client_open(const kvcast_client_options* options, kvcast_client** client);
/* Its sessions were closed before. NULL is none. */
KVCAST_API void kvcast_client_close(kvcast_client* client);

typedef struct kvcast_publication {
    size_t struct_bytes;
    const kvcast_layout* layout;
    const char* model;        /* UTF-8 */
    const char* salt;         /* or NULL */
    const int32_t* token_ids; /* none of them negative */
    size_t tokens;
    uint64_t base_position;
    const kvcast_rows* planes; /* rows of all tokens */
    const uint32_t* levels;    /* ascending; or NULL: all that there are */
    size_t level_count;
    const void* calibration; /* the content of a .kvcal file; or NULL */
    size_t calibration_bytes;
    size_t chunk_tokens;    /* 0: 256 */
    int64_t ttl;            /* seconds that the publication lives; 0: no end */
    const char* session;    /* a tag by which it may be collected, UTF-8; or NULL */
    const char* key;        /* an Ed25519 private key (PEM) that signs the manifest; or NULL */
    int32_t without_tokens; /* keeps the token ids out of the manifest */
    uint32_t block_heads;   /* heads that are coded together; 1 for GPUs; 0: chosen */
    uint32_t run_layers;    /* klt: layers that are decoded one after another; 1 for GPUs; 0: 6 */
    int32_t reserved;
    const double* layer_steps; /* delta: step multipliers [layer][plane]; or NULL: 1 for all */
    /* Told, in the caller's thread, how many tokens a chunk has that was stored, or taken over; where it
     * returns another number than 0, the rest is not (KVCAST_CANCELLED). Or NULL. */
    int (*on_chunk)(void* user, size_t tokens);
    void* user;
    /* Not 0: leading chunks that the destination has are taken over from the publication there with the
     * longest prefix of the context, as far as tokens, base position, levels and calibration are the same,
     * instead of being encoded again: what was loaded at a lossy level replaces nothing better. Their rows
     * are not read. With a key, from a publication that it has signed only; without one, whoever can write to
     * the destination is believed. */
    int32_t extend;
    int32_t reserved_end;
} kvcast_publication;

/* Into a folder, or an http://, https:// or s3:// URL that takes PUT. `url` gets the manifest's, under that
 * destination: KVCAST_BUFFER_TOO_SMALL where it has no room. Returns when all is stored. */
KVCAST_API int kvcast_publish(kvcast_client* client, const char* destination,
                              const kvcast_publication* publication, char* url, size_t url_bytes);

/* Where a plane of one layer goes in device memory. Rows of tokens one after another: token t of the chunk at
 * rows + t * row_bytes. Or in pages, as vLLM keeps them: with s = slot + t, in page pages[s / page_tokens],
 * which is at rows + page * page_bytes, as its row s % page_tokens. `pages` is in device memory too; its
 * entries are the caller's to vouch for. Addresses and strides are multiples of the element's size. */
typedef struct kvcast_place {
    void* rows;
    size_t row_bytes;
    size_t head_bytes; /* from head to head; 0: they lie side by side */
    const int32_t* pages;
    size_t page_tokens;
    size_t page_bytes;
    size_t slot;
} kvcast_place;

/* Where KV goes, by calls from threads of the session: on_place and on_layer from one, on_recompute from
 * another. They may block: what is decoded or recomputed next waits for them. */
typedef struct kvcast_sink {
    size_t struct_bytes;
    void* user;
    /* Rows of a layer of tokens first to end - 1, in the layout's dtype, valid during the call. A chunk's
     * layers come in order, all of them or none (but where the session is cancelled meanwhile), and chunks in
     * any order. */
    void (*on_layer)(void* user, size_t first, size_t end, uint32_t layer, const kvcast_rows* planes);
    /* Tokens that the engine has to compute; all KV before them is there. Returns when theirs is. `token_ids`
     * is NULL where neither side has them. */
    void (*on_recompute)(void* user, size_t first, size_t end, const int32_t* token_ids);
    /* The last call, or NULL. Returns soon. */
    void (*on_finish)(void* user);
    /* With a client of the device "cuda", or NULL: KV then comes in host memory. Says where a chunk goes in
     * device memory, by filling in places [layer][plane], zeros before, and returns 0. Or it returns another
     * number, and the chunk comes at another level, or is recomputed. Memory that it names is written at
     * once, by a stream of the session's own: what was queued on it before is done when this returns.
     * on_layer then gets its addresses, and all work on them is done; rows of a chunk that fails may have
     * been written too. */
    int (*on_place)(void* user, size_t first, size_t end, kvcast_place* places);
} kvcast_sink;

typedef struct kvcast_request {
    size_t struct_bytes;
    const char* manifest_url; /* of a publication; or NULL, and */
    const char* store_url;    /* the store in which the longest prefix of the tokens is looked for */
    const kvcast_layout* layout;
    const char* model;
    const char* salt;         /* or NULL */
    const int32_t* token_ids; /* of the context; may be NULL with a manifest's URL */
    size_t tokens;       /* how many they are; without them, how many there is room for: more are refused */
    size_t chunk_tokens; /* of the store, with store_url; 0: 256 */
    double deadline;     /* seconds from the call on; 0: none */
    double prefill_tokens_per_second; /* that the engine recomputes with; 0: it is asked for what cannot be
                                         had only */
    uint32_t finest_level;            /* finer ones are not loaded; 0: any is */
    const char* rule;                 /* as kvfetch --policy has it; or NULL: two-pointer */
    const char* const*
        trusted_keys; /* Ed25519 public keys (PEM), one of which has signed the manifest; or NULL */
    size_t trusted_key_count;
    /* Leading ones of the context whose KV the engine has: chunks within them are neither fetched nor
     * recomputed, and on_recompute begins behind them. The chunk in which they end comes whole, and on_place
     * is asked for all of it: where memory of theirs is shared, this is a chunk's end, or on_place names
     * other memory. All of the token ids: nothing is fetched, no manifest either. More than there are:
     * refused. */
    size_t present_tokens;
} kvcast_request;

typedef struct kvcast_stored {
    size_t struct_bytes;
    size_t tokens;           /* leading ones of the request's that are stored */
    uint64_t finest_bytes;   /* of their objects, at the finest level that is stored; of chunks within
                                present_tokens none */
    uint64_t coarsest_bytes; /* and at the coarsest one */
    char manifest_url[4096]; /* for a request of them, which need not be looked for again */
} kvcast_stored;

/* How much of a request's context is stored, whatever room there is: for schedulers, which make room before
 * they fetch. No KV comes. Waits for `seconds` at most (KVCAST_TIMEOUT), whatever the request's deadline.
 * KVCAST_NOT_STORED where the store has none of it, or does not show what it has (some answer HTTP status 403
 * to both); KVCAST_BUFFER_TOO_SMALL where the URL is longer than there is room for. Not from a call of a
 * sink. */
KVCAST_API int kvcast_look_up(kvcast_client* client, const kvcast_request* request, double seconds,
                              kvcast_stored* stored);

typedef struct kvcast_summary {
    size_t struct_bytes;
    double time;          /* seconds to the last call of the sink */
    double manifest_time; /* seconds until the manifest was checked */
    uint64_t network_bytes;
    size_t tokens;       /* of the context, present_tokens too */
    size_t text_tokens;  /* that the engine was asked to compute */
    double kl;           /* nats that the loaded tokens are expected to cost; negative: not known */
    int32_t publication; /* why nothing could be loaded: a code; KVCAST_OK: it could */
    int32_t reserved;
} kvcast_summary;

typedef struct kvcast_session kvcast_session;

/* Begins to fetch and returns. The sink's calls may come before that. A client of the device "cuda" is of one
 * device: the one that is current in every thread that calls this. */
KVCAST_API int kvcast_fetch(kvcast_client* client, const kvcast_request* request, const kvcast_sink* sink,
                            kvcast_session** session);
/* Waits until all is there, for `seconds` at most (KVCAST_PENDING), or as long as it takes where that is
 * negative. KVCAST_OK: every token was loaded, recomputed or present. `summary` may be NULL. Not from a call
 * of the sink. */
KVCAST_API int kvcast_session_wait(kvcast_session* session, double seconds, kvcast_summary* summary);
/* For a log: why nothing could be loaded, and why chunks came at another level than was chosen first, or as
 * text; a line for each, "" where there was no trouble. NULL while the session runs. Valid until it is
 * closed. */
KVCAST_API const char* kvcast_session_troubles(kvcast_session* session);
/* Nothing new is fetched or given to the sink; on_finish comes, and waiters get KVCAST_CANCELLED. From any
 * thread. */
KVCAST_API void kvcast_session_cancel(kvcast_session* session);
/* Cancels, and waits for the sink's calls that are running; none comes after that, on_finish neither. Not
 * from one of them, and not while another thread is in a call with the session. NULL is none. */
KVCAST_API void kvcast_session_close(kvcast_session* session);

#ifdef __cplusplus
}
#endif

#endif
