/* The same stand-in for an inference server as server.cpp, in C against libkvcast.so.
 *     server_c store FOLDER     prints the manifest's place
 *     server_c load URL         of the manifest; fails unless every element is as it was stored */
#include <kvcast.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kLayers = 2, kPlanes = 2, kTokens = 600, kHeads = 2, kHeadDim = 64, kRowBytes = 2 * kHeads * kHeadDim };

static unsigned char stored[kLayers * kPlanes][kTokens][kRowBytes];
static unsigned char loaded[kLayers * kPlanes][kTokens][kRowBytes];
static int32_t prompt[kTokens];

static void prefill(void) {
    uint32_t random = 1;
    for (int i = 0; i < kTokens; ++i) prompt[i] = 1000 + i;
    for (int plane = 0; plane < kLayers * kPlanes; ++plane) {
        for (int i = 0; i < kTokens * kRowBytes; i += 2) {
            unsigned char *element = &stored[plane][0][0] + i;
            random = random * 1664525 + 1013904223;
            element[0] = (unsigned char)(random >> 24);
            element[1] = (unsigned char)((random >> 8 & 0x80) | 0x3e | (random >> 23 & 1));
        }
    }
}

static void require(int code) {
    if (code == KVCAST_OK) return;
    fprintf(stderr, "server_c: %s: %s\n", kvcast_code_name(code), kvcast_message());
    exit(1);
}

static void on_layer(void *user, size_t first, size_t end, uint32_t layer, const kvcast_rows *planes) {
    (void)user;
    for (size_t p = 0; p < kPlanes; ++p) {
        const unsigned char *row = planes[p].rows;
        for (size_t t = first; t < end; ++t, row += planes[p].row_bytes)
            memcpy(loaded[layer * kPlanes + p][t], row, kRowBytes);
    }
}

static void on_recompute(void *user, size_t first, size_t end, const int32_t *token_ids) {
    (void)user, (void)token_ids;
    fprintf(stderr, "server_c: asked to recompute tokens %zu to %zu\n", first, end);
    exit(1);
}

static const kvcast_layout layout = {.layers = kLayers,
                                     .planes = kPlanes,
                                     .heads = {kHeads, kHeads},
                                     .head_dim = {kHeadDim, kHeadDim},
                                     .dtype = KVCAST_BF16,
                                     .rope_pairing = KVCAST_HALF,
                                     .rope_dim = kHeadDim,
                                     .rope_theta = 10000};

static void store(kvcast_client *client, const char *folder) {
    kvcast_rows planes[kLayers * kPlanes];
    for (int i = 0; i < kLayers * kPlanes; ++i) planes[i] = (kvcast_rows){stored[i], kRowBytes};
    const uint32_t levels[] = {0, 5};
    const kvcast_publication publication = {.struct_bytes = sizeof publication,
                                            .layout = &layout,
                                            .model = "a model of two layers",
                                            .token_ids = prompt,
                                            .tokens = kTokens,
                                            .planes = planes,
                                            .levels = levels,
                                            .level_count = 2};
    char manifest[4096];
    require(kvcast_publish(client, folder, &publication, manifest, sizeof manifest));
    printf("%s\n", manifest);
}

static void load(kvcast_client *client, const char *url) {
    const kvcast_request request = {.struct_bytes = sizeof request,
                                    .manifest_url = url,
                                    .layout = &layout,
                                    .model = "a model of two layers",
                                    .token_ids = prompt,
                                    .tokens = kTokens};
    const kvcast_sink sink = {.struct_bytes = sizeof sink, .on_layer = on_layer, .on_recompute = on_recompute};
    kvcast_stored there = {.struct_bytes = sizeof there};
    require(kvcast_look_up(client, &request, 10, &there));
    if (there.tokens != kTokens) {
        fprintf(stderr, "server_c: %zu tokens are stored\n", there.tokens);
        exit(1);
    }
    kvcast_session *session;
    kvcast_summary summary = {.struct_bytes = sizeof summary};
    require(kvcast_fetch(client, &request, &sink, &session));
    require(kvcast_session_wait(session, -1, &summary));
    kvcast_session_close(session);
    if (memcmp(loaded, stored, sizeof stored) != 0) {
        fprintf(stderr, "server_c: what was loaded is not what was stored\n");
        exit(1);
    }
    printf("%zu tokens in %.0f ms, by kvcast %s\n", summary.tokens, summary.time * 1e3, kvcast_version());
}

int main(int argc, char **argv) {
    const kvcast_client_options options = {.struct_bytes = sizeof options, .threads = 2};
    kvcast_client *client;
    if (argc != 3 || (strcmp(argv[1], "store") != 0 && strcmp(argv[1], "load") != 0)) {
        fprintf(stderr, "usage: server_c store FOLDER | load URL\n");
        return 2;
    }
    prefill();
    require(kvcast_client_open(&options, &client));
    if (strcmp(argv[1], "store") == 0) store(client, argv[2]);
    if (strcmp(argv[1], "load") == 0) load(client, argv[2]);
    kvcast_client_close(client);
    return 0;
}
