// A Vulkan layer between a program and the Khronos validation layer, which checks what it would otherwise leave out:
//
//   UNCHECKED=1            robustBufferAccess(2) off: the layer then compares every access to a storage buffer with what is bound
//   WORKGROUP_MEMORY=N     the device says that it has N bytes of workgroup memory, so that the layer's counters fit beside
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>
#include <vulkan/vk_layer.h>

static PFN_vkGetInstanceProcAddr next_instance;
static PFN_vkGetDeviceProcAddr next_device;
static VkInstance the_instance;

static int unchecked(void) {
    const char *text = getenv("UNCHECKED");
    return text && !strcmp(text, "1");
}

static void cap(VkPhysicalDeviceLimits *limits) {
    const char *text = getenv("WORKGROUP_MEMORY");
    unsigned long most = text ? strtoul(text, NULL, 10) : 0;
    if (most && limits->maxComputeSharedMemorySize > most) limits->maxComputeSharedMemorySize = most;
}

static VKAPI_ATTR void VKAPI_CALL properties(VkPhysicalDevice device, VkPhysicalDeviceProperties *found) {
    ((PFN_vkGetPhysicalDeviceProperties)next_instance(the_instance, "vkGetPhysicalDeviceProperties"))(device, found);
    cap(&found->limits);
}

static VKAPI_ATTR void VKAPI_CALL properties2(VkPhysicalDevice device, VkPhysicalDeviceProperties2 *found) {
    PFN_vkGetPhysicalDeviceProperties2 next =
        (PFN_vkGetPhysicalDeviceProperties2)next_instance(the_instance, "vkGetPhysicalDeviceProperties2");
    if (!next) next = (PFN_vkGetPhysicalDeviceProperties2)next_instance(the_instance, "vkGetPhysicalDeviceProperties2KHR");
    next(device, found);
    cap(&found->properties.limits);
}

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(
    const VkInstanceCreateInfo *info, const VkAllocationCallbacks *allocator, VkInstance *instance) {
    VkLayerInstanceCreateInfo *chain = (VkLayerInstanceCreateInfo *)info->pNext;
    while (chain && !(chain->sType == VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO && chain->function == VK_LAYER_LINK_INFO))
        chain = (VkLayerInstanceCreateInfo *)chain->pNext;
    if (!chain) return VK_ERROR_INITIALIZATION_FAILED;
    next_instance = chain->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    chain->u.pLayerInfo = chain->u.pLayerInfo->pNext;
    VkResult result = ((PFN_vkCreateInstance)next_instance(NULL, "vkCreateInstance"))(info, allocator, instance);
    if (result == VK_SUCCESS) the_instance = *instance;
    return result;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(
    VkPhysicalDevice physical, const VkDeviceCreateInfo *info, const VkAllocationCallbacks *allocator, VkDevice *device) {
    VkLayerDeviceCreateInfo *chain = (VkLayerDeviceCreateInfo *)info->pNext;
    while (chain && !(chain->sType == VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO && chain->function == VK_LAYER_LINK_INFO))
        chain = (VkLayerDeviceCreateInfo *)chain->pNext;
    if (!chain) return VK_ERROR_INITIALIZATION_FAILED;
    PFN_vkGetInstanceProcAddr next = chain->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    next_device = chain->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    chain->u.pLayerInfo = chain->u.pLayerInfo->pNext;
    VkDeviceCreateInfo copy = *info;
    VkPhysicalDeviceFeatures features;
    if (unchecked()) {
        if (copy.pEnabledFeatures) {
            features = *copy.pEnabledFeatures;
            features.robustBufferAccess = VK_FALSE;
            copy.pEnabledFeatures = &features;
        }
        for (VkBaseOutStructure *more = (VkBaseOutStructure *)copy.pNext; more; more = more->pNext) {
            if (more->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2)
                ((VkPhysicalDeviceFeatures2 *)more)->features.robustBufferAccess = VK_FALSE;
            if (more->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ROBUSTNESS_2_FEATURES_EXT)
                ((VkPhysicalDeviceRobustness2FeaturesEXT *)more)->robustBufferAccess2 = VK_FALSE;
        }
    }
    return ((PFN_vkCreateDevice)next(the_instance, "vkCreateDevice"))(physical, &copy, allocator, device);
}

VK_LAYER_EXPORT VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetDeviceProcAddr(VkDevice device, const char *name) {
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (PFN_vkVoidFunction)vkGetDeviceProcAddr;
    return next_device ? next_device(device, name) : NULL;
}

VK_LAYER_EXPORT VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char *name) {
    if (!strcmp(name, "vkGetInstanceProcAddr")) return (PFN_vkVoidFunction)vkGetInstanceProcAddr;
    if (!strcmp(name, "vkCreateInstance")) return (PFN_vkVoidFunction)create_instance;
    if (!strcmp(name, "vkCreateDevice")) return (PFN_vkVoidFunction)create_device;
    if (!strcmp(name, "vkGetDeviceProcAddr")) return (PFN_vkVoidFunction)vkGetDeviceProcAddr;
    if (!strcmp(name, "vkGetPhysicalDeviceProperties")) return (PFN_vkVoidFunction)properties;
    if (!strcmp(name, "vkGetPhysicalDeviceProperties2")) return (PFN_vkVoidFunction)properties2;
    if (!strcmp(name, "vkGetPhysicalDeviceProperties2KHR")) return (PFN_vkVoidFunction)properties2;
    return next_instance ? next_instance(instance, name) : NULL;
}
